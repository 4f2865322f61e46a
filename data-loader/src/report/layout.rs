//! How the files of a data set are laid out: columns, row groups, pages. From the footers alone.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::LatentDataset;
use crate::footer::Footer;

/// Metadata values are shown up to this length.
const MAX_VALUE_CHARS: usize = 1000;

/// The smallest, the middle and the largest of some numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// The smallest.
    pub min: u64,
    /// Of an even count the lower of the two in the middle.
    pub median: u64,
    /// The largest.
    pub max: u64,
}

impl Spread {
    /// `None` of no numbers.
    pub(crate) fn of(mut numbers: Vec<u64>) -> Option<Self> {
        numbers.sort_unstable();
        let (min, max) = (*numbers.first()?, *numbers.last()?);
        Some(Self { min, median: numbers[(numbers.len() - 1) / 2], max })
    }
}

/// A column of the files, with everything below it.
#[derive(Clone, Debug, Serialize)]
pub struct ColumnLayout {
    /// Its name.
    pub name: String,
    /// What the data set takes it for: `latent`, `label`, `id`, or nothing.
    pub role: Option<&'static str>,
    /// The arrow type in the first file that has it.
    #[serde(rename = "type")]
    pub data_type: String,
    /// Encodings of its pages.
    pub encodings: BTreeSet<String>,
    /// Compression of its pages.
    pub compression: BTreeSet<String>,
    /// Bytes in the files.
    pub stored_bytes: u64,
    /// Bytes of its pages when decompressed.
    pub decoded_bytes: u64,
}

/// How the files are laid out.
#[derive(Clone, Debug, Serialize)]
pub struct Layout {
    /// Programs that wrote the files, as they call themselves.
    pub created_by: BTreeSet<String>,
    /// Key-value metadata of the first file, long values cut.
    pub metadata: BTreeMap<String, String>,
    /// The columns in the order of the first file; those of other files follow.
    pub columns: Vec<ColumnLayout>,
    /// Bytes of all files.
    pub total_file_bytes: u64,
    /// Bytes of a file.
    pub file_bytes: Option<Spread>,
    /// Rows of a row group.
    pub row_group_rows: Option<Spread>,
    /// Bytes of a row group in the file, all columns.
    pub row_group_bytes: Option<Spread>,
    /// Column chunks of latents that have an offset index, so that a few rows can be read without the whole chunk.
    pub indexed_latent_chunks: u64,
    /// All column chunks of latents.
    pub latent_chunks: u64,
    /// Bytes in the file of a page of latents, where there is an offset index.
    pub latent_page_bytes: Option<Spread>,
    /// Rows of a page of latents, where there is an offset index.
    pub latent_page_rows: Option<Spread>,
}

impl Layout {
    /// Of an opened data set.
    pub(crate) fn of(dataset: &LatentDataset) -> Self {
        let mut layout = Self {
            created_by: BTreeSet::new(),
            metadata: dataset.files.first().map(metadata).unwrap_or_default(),
            columns: Vec::new(),
            total_file_bytes: dataset.files.iter().map(|footer| footer.file.file_bytes).sum(),
            file_bytes: Spread::of(dataset.files.iter().map(|footer| footer.file.file_bytes).collect()),
            row_group_rows: Spread::of(dataset.row_groups().iter().map(|group| group.rows).collect()),
            row_group_bytes: None,
            indexed_latent_chunks: 0,
            latent_chunks: 0,
            latent_page_bytes: None,
            latent_page_rows: None,
        };
        let (mut group_bytes, mut page_bytes, mut page_rows) = (Vec::new(), Vec::new(), Vec::new());
        for footer in &dataset.files {
            let parquet = footer.metadata.metadata();
            layout.created_by.extend(parquet.file_metadata().created_by().map(str::to_owned));
            for (at, group) in parquet.row_groups().iter().enumerate() {
                group_bytes.push(group.columns().iter().map(|chunk| chunk.compressed_size().max(0) as u64).sum());
                let index = parquet.page_index_for_row_group(at);
                for (leaf, chunk) in group.columns().iter().enumerate() {
                    let name = chunk.column_path().parts().first().map_or("", String::as_str);
                    let column = layout.column(dataset, footer, name);
                    column.encodings.extend(chunk.encodings().map(|encoding| encoding.to_string()));
                    column.compression.insert(chunk.compression_codec().to_string());
                    column.stored_bytes += chunk.compressed_size().max(0) as u64;
                    column.decoded_bytes += chunk.uncompressed_size().max(0) as u64;
                    if column.role != Some("latent") {
                        continue;
                    }
                    layout.latent_chunks += 1;
                    let Some(pages) = index.offset_index(leaf) else { continue };
                    layout.indexed_latent_chunks += 1;
                    let pages = pages.page_locations();
                    let ends = pages.iter().skip(1).map(|page| page.first_row_index).chain([group.num_rows()]);
                    page_rows
                        .extend(pages.iter().zip(ends).map(|(page, end)| (end - page.first_row_index).max(0) as u64));
                    page_bytes.extend(pages.iter().map(|page| page.compressed_page_size.max(0) as u64));
                }
            }
        }
        layout.row_group_bytes = Spread::of(group_bytes);
        layout.latent_page_bytes = Spread::of(page_bytes);
        layout.latent_page_rows = Spread::of(page_rows);
        layout
    }

    fn column(&mut self, dataset: &LatentDataset, footer: &Footer, name: &str) -> &mut ColumnLayout {
        let at = self.columns.iter().position(|column| column.name == name).unwrap_or_else(|| {
            let field = footer.metadata.schema().column_with_name(name);
            self.columns.push(ColumnLayout {
                name: name.to_owned(),
                role: role(dataset, footer, name),
                data_type: field.map_or_else(String::new, |(_, field)| field.data_type().to_string()),
                encodings: BTreeSet::new(),
                compression: BTreeSet::new(),
                stored_bytes: 0,
                decoded_bytes: 0,
            });
            self.columns.len() - 1
        });
        &mut self.columns[at]
    }
}

fn role(dataset: &LatentDataset, footer: &Footer, name: &str) -> Option<&'static str> {
    if footer.latents.iter().any(|(latent, _)| latent == name) {
        return Some("latent");
    }
    if footer.captions.iter().any(|(caption, _)| caption == name) {
        return Some("caption");
    }
    if footer.caption_masks.iter().any(|mask| mask == name) {
        return Some("mask");
    }
    let columns = dataset.columns();
    [(&columns.label, "label"), (&columns.id, "id")]
        .into_iter()
        .find(|(column, _)| *column == name)
        .map(|(_, role)| role)
}

/// The footer's keys, and those that a writer put into the embedded arrow schema instead.
fn metadata(footer: &Footer) -> BTreeMap<String, String> {
    let pairs = footer.metadata.metadata().file_metadata().key_value_metadata();
    let of_footer = pairs.into_iter().flatten().filter_map(|pair| Some((pair.key.clone(), pair.value.clone()?)));
    let of_schema = footer.metadata.schema().metadata().iter().map(|(key, value)| (key.clone(), value.clone()));
    // The schema itself is told by the columns.
    let shown = of_footer.chain(of_schema).filter(|(key, _)| key != "ARROW:schema");
    shown.map(|(key, value)| (key, cut(value))).collect()
}

fn cut(value: String) -> String {
    match value.char_indices().nth(MAX_VALUE_CHARS) {
        Some((at, _)) => format!("{}… ({} bytes)", &value[..at], value.len()),
        None => value,
    }
}
