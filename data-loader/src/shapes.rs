//! The shapes of a data set's latents, where rows have shapes of their own.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};

use crate::decode::{self, BadRow};
use crate::{DataError, LatentDataset};

/// Row groups whose shapes are fetched at the same time.
const ROW_GROUPS_AT_ONCE: usize = 8;

/// Whether all latents of a data set have one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shapes {
    /// They have, see [`crate::DatasetMeta::latent_shape`].
    Same,
    /// Each row has a shape of its own, see [`LatentDataset::row_shapes`]; `Some` where all rows agree on a dimension, such as
    /// `[Some(4), None, None]`.
    Variable(Vec<Option<usize>>),
}

/// The shape of every row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowShapes {
    shapes: Vec<Vec<usize>>,
    /// The number in `shapes` of each row's; empty where all rows have the only one.
    of_rows: Vec<u32>,
}

impl RowShapes {
    /// Of rows that all have one shape.
    pub(crate) fn all_same(shape: Vec<usize>) -> Self {
        Self { shapes: vec![shape], of_rows: Vec::new() }
    }

    /// Of rows one after the other.
    fn collect(rows: impl Iterator<Item = Vec<usize>>) -> Self {
        let mut found = BTreeMap::new();
        let mut of_rows: Vec<u32> = Vec::new();
        for shape in rows {
            let next = found.len() as u32;
            of_rows.push(*found.entry(shape).or_insert(next));
        }
        // From the order in which they were found to their own.
        let mut numbers = vec![0; found.len()];
        for ((_, found), number) in found.iter().zip(0..) {
            numbers[*found as usize] = number;
        }
        let shapes: Vec<Vec<usize>> = found.into_keys().collect();
        of_rows.iter_mut().for_each(|shape| *shape = numbers[*shape as usize]);
        if shapes.len() == 1 {
            of_rows = Vec::new();
        }
        Self { shapes, of_rows }
    }

    /// The shapes that occur, in ascending order.
    pub fn shapes(&self) -> &[Vec<usize>] {
        &self.shapes
    }

    /// The number in [`RowShapes::shapes`] of a data set row's shape.
    ///
    /// # Panics
    /// If there is no such row and shapes differ.
    pub fn index(&self, row: u64) -> usize {
        if self.of_rows.is_empty() { 0 } else { self.of_rows[row as usize] as usize }
    }

    /// The shape of a data set row.
    ///
    /// # Panics
    /// As [`RowShapes::index`].
    pub fn of(&self, row: u64) -> &[usize] {
        &self.shapes[self.index(row)]
    }

    /// The shape of all rows, if they have one.
    pub fn same(&self) -> Option<&[usize]> {
        if self.of_rows.is_empty() { self.shapes.first().map(Vec::as_slice) } else { None }
    }
}

impl LatentDataset {
    /// The shape of every row. Where rows have shapes of their own, the first call reads the shape column, or without one all
    /// of the latent column; later calls are free.
    ///
    /// # Errors
    /// If a row group cannot be read, or a row has no shape or one that the metadata rules out.
    pub fn row_shapes(&self) -> Result<Arc<RowShapes>, DataError> {
        self.io.block_on(self.load_shapes()).cloned()
    }

    /// The same inside of the runtime.
    pub(crate) async fn load_shapes(&self) -> Result<&Arc<RowShapes>, DataError> {
        self.row_shapes
            .get_or_try_init(|| async {
                let groups = 0..self.row_groups().len();
                let read =
                    futures::stream::iter(groups).map(|at| self.group_shapes(at)).buffered(self.groups_at_once());
                // Rows of one shape share it, so that what is kept is small.
                let groups: Vec<RowShapes> = read.try_collect().await?;
                let rows = self
                    .row_groups()
                    .iter()
                    .zip(&groups)
                    .flat_map(|(group, shapes)| (0..group.rows).map(|row| shapes.of(row).to_vec()));
                Ok(Arc::new(RowShapes::collect(rows)))
            })
            .await
    }

    fn groups_at_once(&self) -> usize {
        if self.has_shape_column() { ROW_GROUPS_AT_ONCE } else { 1 }
    }

    async fn group_shapes(&self, at: usize) -> Result<RowShapes, DataError> {
        let group = self.row_groups()[at];
        let levels = self.stored[0].levels;
        let column = if self.has_shape_column() { &self.columns().shape } else { &self.stored[0].name };
        let template: &[Option<usize>] = match &self.meta().shapes {
            Shapes::Variable(dims) => dims,
            Shapes::Same => &[],
        };
        let mut shapes = Vec::new();
        for batch in self.fetch_group(at, column).await? {
            let found = match self.has_shape_column() {
                true => decode::shapes(&batch),
                false => decode::nested_shapes(&batch, levels),
            };
            let first = group.first_row + shapes.len() as u64;
            let bad = |bad: BadRow| self.row_error(first + bad.row as u64, column, bad.found, bad.expected);
            shapes.extend(found.map_err(bad)?);
        }
        let fits = |shape: &Vec<usize>| {
            shape.len() == template.len()
                && shape.iter().zip(template).all(|(dim, wanted)| wanted.is_none_or(|wanted| wanted == *dim))
        };
        if let Some(row) = shapes.iter().position(|shape| !fits(shape)) {
            let found = format!("of shape {:?}", shapes[row]);
            return Err(self.row_error(
                group.first_row + row as u64,
                column,
                found,
                format!("a shape like {}", template_text(template)),
            ));
        }
        self.check_group_numel(at, shapes.iter().map(|shape| shape.iter().product::<usize>() as u64).sum())?;
        Ok(RowShapes::collect(shapes.into_iter()))
    }
}

/// `[4, any, any]`
pub(crate) fn template_text(dims: &[Option<usize>]) -> String {
    let dims: Vec<String> = dims.iter().map(|dim| dim.map_or("any".to_owned(), |dim| dim.to_string())).collect();
    format!("[{}]", dims.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_numbered_in_their_own_order() {
        let rows = [vec![1, 9, 2], vec![1, 2, 9], vec![1, 9, 2], vec![1, 2, 10]];
        let shapes = RowShapes::collect(rows.iter().cloned());
        assert_eq!(shapes.shapes(), [vec![1, 2, 9], vec![1, 2, 10], vec![1, 9, 2]]);
        assert_eq!([0, 1, 2, 3].map(|row| shapes.index(row)), [2, 0, 2, 1]);
        assert_eq!((shapes.of(3), shapes.same()), (&[1, 2, 10][..], None));
        let same = RowShapes::collect(vec![vec![4, 2, 2]; 3].into_iter());
        assert_eq!((same.same(), same.of(2)), (Some(&[4, 2, 2][..]), &[4, 2, 2][..]));
    }
}
