//! The twelve published DiT sizes: four widths, each with three patch sizes.
//!
//! Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", table 1.

/// Dimensions that a preset stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// Name as used in configs, e.g. `DiT-XL/2`.
    pub name: &'static str,
    /// Width of a token.
    pub hidden_size: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads per block.
    pub num_heads: usize,
    /// Side of a square patch, in latent pixels.
    pub patch_size: usize,
}

const fn preset(name: &'static str, width: (usize, usize, usize), patch_size: usize) -> Preset {
    let (hidden_size, depth, num_heads) = width;
    Preset { name, hidden_size, depth, num_heads, patch_size }
}

const S: (usize, usize, usize) = (384, 12, 6);
const B: (usize, usize, usize) = (768, 12, 12);
const L: (usize, usize, usize) = (1024, 24, 16);
const XL: (usize, usize, usize) = (1152, 28, 16);

/// All presets, smallest width first.
pub const ALL: [Preset; 12] = [
    preset("DiT-S/2", S, 2),
    preset("DiT-S/4", S, 4),
    preset("DiT-S/8", S, 8),
    preset("DiT-B/2", B, 2),
    preset("DiT-B/4", B, 4),
    preset("DiT-B/8", B, 8),
    preset("DiT-L/2", L, 2),
    preset("DiT-L/4", L, 4),
    preset("DiT-L/8", L, 8),
    preset("DiT-XL/2", XL, 2),
    preset("DiT-XL/4", XL, 4),
    preset("DiT-XL/8", XL, 8),
];

/// The preset of that exact name.
pub fn by_name(name: &str) -> Option<Preset> {
    ALL.into_iter().find(|preset| preset.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_the_patch_size_and_heads_divide_the_width() {
        for preset in ALL {
            assert!(preset.name.ends_with(&format!("/{}", preset.patch_size)), "{}", preset.name);
            assert_eq!(preset.hidden_size % preset.num_heads, 0, "{}", preset.name);
            assert_eq!(by_name(preset.name), Some(preset));
        }
        assert_eq!(by_name("DiT-XL/2").map(|p| (p.hidden_size, p.depth, p.num_heads)), Some((1152, 28, 16)));
        assert_eq!(by_name("DiT-M/2"), None);
    }
}
