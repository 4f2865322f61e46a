use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// FLOP/s of a float32 matrix product on `device`, the best of twenty; the "peak" that MFU is a share of. Takes some
/// tenths of a second.
pub fn measured_gemm_rate(device: Device) -> f64 {
    let side: i64 = if device.is_cuda() { 8192 } else { 768 };
    let _no_grad = tch::no_grad_guard();
    let a = Tensor::ones([side, side], (Kind::Float, device));
    let once = || {
        let started = Instant::now();
        // Reading one element waits for the device.
        let _ = a.matmul(&a).double_value(&[0, 0]);
        started.elapsed().as_secs_f64()
    };
    once();
    let fastest = (0..20).map(|_| once()).fold(f64::INFINITY, f64::min);
    2.0 * (side as f64).powi(3) / fastest
}
