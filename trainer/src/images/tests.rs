#![allow(clippy::unwrap_used)]
//! Against Pillow 13.0.0, numpy's layout, and by hand.

use std::io::{Cursor, Read};

use super::*;

/// A picture with slopes and edges that a formula gives, so that Pillow could be fed the same one.
fn picture(width: usize, height: usize, channels: usize) -> Picture {
    let value = |i: usize| {
        let (y, x, k) = (i / channels / width, i / channels % width, i % channels);
        ((x * 5 + y * 3 + k * 60) % 200 + (x / 7 + y / 5) % 2 * 55) as u8
    };
    Picture::new(width, height, channels, (0..width * height * channels).map(value).collect()).unwrap()
}

/// (width, height, channels), size, first six bytes, last six bytes, Σ byte·(index mod 251 + 1) of what ADM's
/// `center_crop_arr` gives with Pillow 13.0.0.
type Recorded = ((usize, usize, usize), usize, [u8; 6], [u8; 6], u64);

const PILLOW: [Recorded; 5] = [
    ((37, 53, 3), 8, [64, 124, 186, 90, 150, 199], [86, 146, 145, 122, 182, 53], 2361844),
    ((100, 41, 3), 12, [154, 8, 74, 209, 64, 124], [56, 116, 176, 72, 132, 195], 6130488),
    ((20, 15, 1), 16, [9, 14, 19, 24, 24, 70], [154, 161, 149, 109, 118, 123], 3160679),
    ((64, 64, 1), 8, [52, 101, 135, 177, 175, 54], [105, 145, 185, 144, 65, 105], 268565),
    ((500, 375, 3), 64, [178, 137, 98, 194, 41, 108], [75, 138, 204, 109, 169, 144], 198242680),
];

#[test]
fn centre_crop_is_that_of_adm_with_pillow() {
    for ((width, height, channels), size, first, last, checksum) in PILLOW {
        let crop = picture(width, height, channels).centre_crop(size).unwrap();
        let name = format!("{width} x {height} x {channels} to {size}");
        assert_eq!((crop.width, crop.height, crop.channels), (size, size, channels), "{name}");
        assert_eq!(crop.pixels[..6], first, "{name}");
        assert_eq!(crop.pixels[crop.pixels.len() - 6..], last, "{name}");
        let sum: u64 = crop.pixels.iter().enumerate().map(|(i, &v)| u64::from(v) * (i as u64 % 251 + 1)).sum();
        assert_eq!(sum, checksum, "{name}");
    }
}

#[test]
fn gray_and_colour_convert_as_in_pillow() {
    // Pillow: Image.fromarray(rgb).convert("L") of picture(6, 2, 3).
    let gray = picture(6, 2, 3).into_channels(1);
    let expected_rgb_start = [0, 60, 120, 5, 65, 125];
    assert_eq!(picture(6, 2, 3).pixels[..6], expected_rgb_start);
    assert_eq!(gray.pixels, [49, 54, 59, 64, 69, 74, 52, 57, 62, 67, 72, 77]);
    assert_eq!(gray.into_channels(3).pixels[..6], [49, 49, 49, 54, 54, 54]);
}

#[test]
fn padding_centres_the_picture_on_black() {
    let padded = Picture::new(2, 1, 1, vec![5, 6]).unwrap().pad(4).unwrap();
    assert_eq!(padded.pixels, [[0; 4], [0, 5, 6, 0], [0; 4], [0; 4]].concat());
    assert!(picture(5, 4, 1).pad(4).unwrap_err().to_string().contains("5 x 4, larger than 4"));
}

fn member(zip: &mut npyz::zip::ZipArchive<std::fs::File>, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    zip.by_name(name).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn npz_holds_arr_0_as_rgb_rows_and_arr_1_as_labels() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        let path = dir.path().join(name);
        let mut npz = NpzWriter::create(&path, 3, 1, 2).unwrap();
        npz.push(&ImageBatch::new([2, 1, 1, 2], vec![1, 2, 3, 4]).unwrap()).unwrap();
        npz.push(&ImageBatch::new([1, 3, 1, 2], vec![5, 6, 7, 8, 9, 10]).unwrap()).unwrap();
        npz.finish(Some(&[4, -1, 6])).unwrap();
        path
    };
    let (path, again) = (write("a.npz"), write("b.npz"));
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(again).unwrap());
    let mut zip = npyz::zip::ZipArchive::new(std::fs::File::open(&path).unwrap()).unwrap();
    let arr_0 = npyz::NpyFile::new(Cursor::new(member(&mut zip, "arr_0.npy"))).unwrap();
    assert_eq!((arr_0.shape(), arr_0.dtype().descr()), (&[3, 1, 2, 3][..], "'|u1'".into()));
    assert_eq!(arr_0.into_vec::<u8>().unwrap(), [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 7, 9, 6, 8, 10]);
    let arr_1 = npyz::NpyFile::new(Cursor::new(member(&mut zip, "arr_1.npy"))).unwrap();
    assert_eq!(arr_1.shape(), [3]);
    assert_eq!(arr_1.into_vec::<i64>().unwrap(), [4, -1, 6]);
}

#[test]
fn an_unfinished_npz_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.npz");
    let mut npz = NpzWriter::create(&path, 2, 1, 1).unwrap();
    npz.push(&ImageBatch::new([1, 1, 1, 1], vec![1]).unwrap()).unwrap();
    let message = npz.finish(None).unwrap_err().to_string();
    assert!(message.contains("a.npz: 1 images and no labels, expected 2"), "{message}");
    let mut npz = NpzWriter::create(&path, 1, 1, 1).unwrap();
    assert!(npz.push(&ImageBatch::new([2, 1, 1, 1], vec![1, 2]).unwrap()).is_err());
    drop(npz);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
