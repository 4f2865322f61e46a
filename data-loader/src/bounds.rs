//! Bounds on what a file can make its reader allocate: a few bytes may claim to be billions of numbers.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;

use crate::footer::Footer;
use crate::pages::pages;
use crate::source::ObjectReader;
use crate::{DataError, LatentDataset};

/// What any page or row group may come to when decoded.
const FREE_BYTES: u64 = 128 << 20;
/// What is stored may come to this many times its length beyond that. Latents are close to noise, and hardly get smaller at all.
const MOST_FOLD: u64 = 1024;
/// Memory that a decoded value, or a row besides its latents, takes at most.
const VALUE_BYTES: u64 = 16;

/// Bytes that `stored` bytes may become.
pub(crate) fn most_decoded(stored_bytes: u64) -> u64 {
    stored_bytes.saturating_mul(MOST_FOLD).saturating_add(FREE_BYTES)
}

/// Refuses a file with a row group that claims more rows than its bytes can reasonably hold; each has `row_bytes` of latents.
pub(crate) fn check_row_groups(footer: &Footer, row_bytes: usize) -> Result<(), DataError> {
    for (row_group, group) in footer.metadata.metadata().row_groups().iter().enumerate() {
        // `Footer::read` has refused negative counts.
        let stored: u64 = group.columns().iter().map(|column| column.compressed_size() as u64).sum();
        let decoded = (group.num_rows() as u64).saturating_mul(row_bytes as u64 + VALUE_BYTES);
        if decoded > most_decoded(stored) {
            let reason = format!(
                "{} rows of {row_bytes} bytes of latents are claimed to lie in {stored} bytes; at most {MOST_FOLD} times as many and {} MiB are believed",
                group.num_rows(),
                FREE_BYTES >> 20
            );
            return Err(DataError::RowGroup { file: footer.file.name.clone(), row_group, reason });
        }
    }
    Ok(())
}

impl LatentDataset {
    /// Refuses a row group whose rows claim shapes with more numbers than its bytes can reasonably hold.
    pub(crate) fn check_group_numel(&self, at: usize, numel: u64) -> Result<(), DataError> {
        let group = &self.row_groups()[at];
        let footer = &self.files[group.file];
        let columns = footer.metadata.metadata().row_group(group.index_in_file).columns();
        let stored: u64 = columns.iter().map(|column| column.compressed_size() as u64).sum();
        let decoded: u64 = self.stored.iter().map(|column| numel.saturating_mul(column.dtype.bytes() as u64)).sum();
        if decoded <= most_decoded(stored) {
            return Ok(());
        }
        let reason = format!(
            "its rows claim {numel} numbers in {stored} bytes; at most {MOST_FOLD} times as many bytes and {} MiB are believed",
            FREE_BYTES >> 20
        );
        Err(DataError::RowGroup { file: footer.file.name.clone(), row_group: group.index_in_file, reason })
    }
}

/// Feeds the parquet decoder, which allocates whatever a page header says, with pages that say no more than they can hold.
pub(crate) struct BoundedReader(pub ObjectReader);

impl AsyncFileReader for BoundedReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, parquet::errors::Result<Bytes>> {
        let one = self.get_byte_ranges(vec![range]);
        async move { Ok(one.await?.swap_remove(0)) }.boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, parquet::errors::Result<Vec<Bytes>>> {
        async move {
            let starts: Vec<u64> = ranges.iter().map(|range| range.start).collect();
            let fetched = self.0.get_byte_ranges(ranges).await?;
            for (start, bytes) in starts.into_iter().zip(&fetched) {
                check_pages(start, bytes)?;
            }
            Ok(fetched)
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, parquet::errors::Result<Arc<ParquetMetaData>>> {
        self.0.get_metadata(options)
    }
}

/// `bytes` are whole pages, from `start` on in the file. What cannot be read as such is left to the decoder to name.
fn check_pages(start: u64, bytes: &Bytes) -> parquet::errors::Result<()> {
    for page in pages(bytes).map_while(Result::ok) {
        let most = most_decoded(page.bytes as u64);
        if page.decoded_bytes as u64 > most || (page.values as u64).saturating_mul(VALUE_BYTES) > most {
            return Err(ParquetError::General(format!(
                "the page at byte {} claims {} values in {} bytes, {} when decompressed; at most {most} are believed",
                start + page.start as u64,
                page.values,
                page.bytes,
                page.decoded_bytes
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use parquet::file::metadata::{ParquetMetaDataReader, ParquetMetaDataWriter};

    use super::*;
    use crate::pages::tests::written;
    use crate::testing::{samples, write};
    use crate::{Columns, WriterOptions};

    #[test]
    fn pages_that_claim_too_much_are_refused() {
        let page = |bytes: usize, decoded: u32| Bytes::from(written(0, &vec![7; bytes], decoded, None));
        assert!(check_pages(0, &page(100, 128 << 20)).is_ok());
        assert!(check_pages(0, &page(1 << 20, 1 << 30)).is_ok());
        let error = check_pages(40, &page(100, 1 << 30)).unwrap_err().to_string();
        assert!(error.contains("1073741824 when decompressed") && error.contains("byte 64"), "{error}");
        // What is no page is the decoder's to judge.
        assert!(check_pages(0, &Bytes::from_static(b"PAR1")).is_ok());
    }

    #[test]
    fn row_groups_that_claim_too_many_rows_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let options = WriterOptions::new(vec![1, 2, 2]);
        write(&path, options.clone(), &samples(20, &options));
        let open = || LatentDataset::open(path.to_str().unwrap(), &Columns::default());
        let good = fs::read(&path).unwrap();
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&Bytes::from(good.clone())).unwrap();
        for (rows, row_bytes) in [(1i64 << 40, 0), (i64::MAX, 0), (7_000_000, 16)] {
            let groups = metadata.row_groups().iter().cloned();
            let lies = groups.map(|group| group.into_builder().set_num_rows(rows).build().unwrap()).collect();
            let lying = metadata.clone().into_builder().set_row_groups(lies).build();
            let mut bytes = good.clone();
            ParquetMetaDataWriter::new(&mut bytes, &lying).finish().unwrap();
            fs::write(&path, bytes).unwrap();
            let error = open().unwrap_err().to_string();
            let words = format!("{rows} rows of {row_bytes} bytes");
            assert!(error.contains(&words) && error.contains("row group 0"), "{error}");
        }
        fs::write(&path, good).unwrap();
        assert!(open().is_ok());
    }
}
