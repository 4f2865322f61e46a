#![allow(clippy::unwrap_used)]
//! The command as a whole, on small sources and the small VAE of tests/bundles.

use std::path::{Path, PathBuf};

use data_loader::{Columns, LatentDataset, RowRun};
use tch::{Device, Kind, Tensor};

use super::*;

pub(super) fn recipe() -> Recipe {
    Recipe {
        format: FORMAT,
        source_digest: "ab".into(),
        rows: 10,
        num_classes: 3,
        vae_digest: "cd".into(),
        scaling_factor: 0.5,
        shift_factor: 0.0,
        latent_shape: vec![4, 8, 8],
        image_size: 32,
        pad: false,
        mirror: false,
        dtype: "f16".into(),
        parts: 2,
        row_group_rows: 4096,
    }
}

/// A folder with the VAE of the bundle: RGB, 2 pixels per latent element.
fn vae_folder(dir: &Path) -> PathBuf {
    let dir = dir.join("vae");
    std::fs::create_dir_all(&dir).unwrap();
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/bundles/vae_legacy_names.safetensors");
    std::fs::copy(bundle, dir.join("diffusion_pytorch_model.safetensors")).unwrap();
    let config = r#"{"down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"], "norm_num_groups": 8,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "block_out_channels": [16, 32], "sample_size": 8}"#;
    std::fs::write(dir.join("config.json"), config).unwrap();
    dir
}

/// Options for 11 gray images of 4×4 in the folder `dir/idx`, padded to 8×8.
fn args(dir: &Path, out: &str) -> EncodeArgs {
    let idx = dir.join("idx");
    if !idx.exists() {
        std::fs::create_dir_all(&idx).unwrap();
        idx::tests::write_idx(&idx, 11);
    }
    EncodeArgs {
        source: format!("idx:{}", idx.display()),
        vae: vae_folder(dir),
        out: dir.join(out),
        image_size: None,
        pad: true,
        mirror: true,
        batch: 2,
        rows_per_file: 4,
        row_group: 2,
        dtype: StoredDtype::F32,
        num_classes: None,
        on_error: OnError::Fail,
        threads: 1,
        loaders: 2,
        device: DeviceChoice::Cpu,
        rank: None,
        world_size: None,
    }
}

/// Names and contents of the files of a folder.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn any_number_of_ranks_writes_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    run(args(dir.path(), "one")).unwrap();
    for rank in [2, 0, 1] {
        run(EncodeArgs { rank: Some(rank), world_size: Some(3), loaders: 1, ..args(dir.path(), "three") }).unwrap();
    }
    let one = contents(&dir.path().join("one"));
    assert_eq!(
        one.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        ["encode.json", "part-00000-of-00003.parquet", "part-00001-of-00003.parquet", "part-00002-of-00003.parquet",]
    );
    assert!(one == contents(&dir.path().join("three")), "three ranks wrote other bytes than one");
}

#[test]
fn rows_hold_the_moments_of_the_images_and_their_mirror_images_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let args = args(dir.path(), "out");
    run(args.clone()).unwrap();
    let dataset = LatentDataset::open(args.out.to_str().unwrap(), &Columns::default()).unwrap();
    let vae = AutoencoderKl::load(&args.vae, Device::Cpu).unwrap();
    let meta = dataset.meta();
    assert_eq!((meta.rows, meta.num_classes, meta.scaling_factor), (11, Some(3), Some(0.18215)));
    assert_eq!((&meta.latent_shape[..], meta.vae_digest.as_deref()), (&[4, 4, 4][..], vae.digest()));
    let block = dataset.read(&[RowRun { first_row: 0, rows: 11 }]).unwrap();
    for row in [0, 5, 10] {
        // Pixel p of image i is 10·i + p; it stands in the middle of 8×8 black pixels, the same in all three channels.
        let picture: Vec<f32> = (0..16).map(|p| (10 * row + p) as f32 / 127.5 - 1.0).collect();
        let image = Tensor::full([1, 3, 8, 8], -1.0, (Kind::Float, Device::Cpu));
        image
            .narrow(2, 2, 4)
            .narrow(3, 2, 4)
            .copy_(&Tensor::from_slice(&picture).reshape([1, 1, 4, 4]).expand([1, 3, 4, 4], false));
        let (straight, mirrored) = (vae.encode(&image).unwrap(), vae.encode(&image.flip([3])).unwrap());
        for (column, expected) in [straight.mean, straight.logvar, mirrored.mean, mirrored.logvar].iter().enumerate() {
            let mut found = vec![0f32; 64];
            block.latent(column, row, &mut found);
            let error = (Tensor::from_slice(&found) - expected.flatten(0, -1)).abs().max().double_value(&[]);
            assert!(error < 1e-5, "row {row} column {column}: error {error}");
        }
        assert_eq!(block.labels()[row], row as i64 % 3);
    }
}

#[test]
fn a_stopped_run_continues_with_what_is_missing_or_damaged() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let args = args(dir.path(), "out");
    run(args.clone()).unwrap();
    let before = contents(&args.out);
    let part = |n: usize| args.out.join(format!("part-0000{n}-of-00003.parquet"));
    let inode = |n: usize| std::fs::metadata(part(n)).unwrap().ino();
    let kept = inode(1);
    std::fs::remove_file(part(0)).unwrap();
    let bytes = std::fs::read(part(2)).unwrap();
    std::fs::write(part(2), &bytes[..bytes.len() / 2]).unwrap();
    std::fs::write(args.out.join(".part-00000-of-00003.parquet.77.tmp"), "of a killed process").unwrap();
    run(args.clone()).unwrap();
    assert!(contents(&args.out) == before);
    assert_eq!(inode(1), kept, "a finished part was made again");
    let message = run(EncodeArgs { mirror: false, ..args }).unwrap_err().to_string();
    assert!(message.contains("`mirror` = true there, false now"), "{message}");
}

#[test]
fn an_unreadable_image_is_named_or_left_out_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    for (name, value) in [("cat/1.png", 10), ("cat/2.png", 20), ("dog/1.png", 30)] {
        std::fs::create_dir_all(images.join(name).parent().unwrap()).unwrap();
        image::RgbImage::from_pixel(20, 30, image::Rgb([value; 3])).save(images.join(name)).unwrap();
    }
    std::fs::write(images.join("cat/2.png"), b"\x89PNG\r\n\x1a\n, cut short").unwrap();
    let args = EncodeArgs {
        source: format!("folder:{}", images.display()),
        pad: false,
        rows_per_file: 100,
        ..args(dir.path(), "out")
    };
    let message = format!("{:#}", run(args.clone()).unwrap_err());
    assert!(message.contains("cat/2.png") && message.contains("not a readable image"), "{message}");
    assert_eq!(contents(&args.out).len(), 1, "only encode.json is there after a failure");
    let skip = EncodeArgs { on_error: OnError::Skip, ..args.clone() };
    run(skip.clone()).unwrap();
    let dataset = LatentDataset::open(args.out.to_str().unwrap(), &Columns::default()).unwrap();
    assert_eq!(dataset.read(&[RowRun { first_row: 0, rows: dataset.meta().rows }]).unwrap().labels(), [0, 1]);
    let made = contents(&args.out);
    run(skip).unwrap();
    assert!(contents(&args.out) == made);
    // Asked to fail, the part with a gap is not taken for complete.
    assert!(run(args).is_err());
}

#[test]
fn options_that_cannot_work_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let args = args(dir.path(), "out");
    let refused = [
        (EncodeArgs { image_size: Some(7), ..args.clone() }, "--image-size = 7, expected a multiple of 2"),
        (EncodeArgs { num_classes: Some(2), ..args.clone() }, "--num-classes = 2"),
        (EncodeArgs { vae: dir.path().join("none"), ..args.clone() }, "none/config.json: cannot read it"),
        (EncodeArgs { source: "zip:x".into(), ..args.clone() }, "the kind \"zip\" is unknown"),
        (EncodeArgs { source: "x".into(), ..args.clone() }, "there is no colon"),
        (EncodeArgs { source: "folder:/does/not/exist".into(), ..args.clone() }, "/does/not/exist: cannot list it"),
    ];
    for (args, expected) in refused {
        let message = format!("{:#}", run(args).unwrap_err());
        assert!(message.contains(expected), "{message}");
        assert_eq!(message.matches("No such file").count().max(1), 1, "said twice: {message}");
    }
    assert!(!args.out.exists());
    // Images larger than the padded size are errors of those images.
    let message = format!("{:#}", run(EncodeArgs { image_size: Some(2), ..args }).unwrap_err());
    assert!(message.contains("train/00000") && message.contains("4 x 4, larger than 2"), "{message}");
}
