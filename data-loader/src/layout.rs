//! From the footers and the first row to the shape of the latents and the layout of their columns.

use arrow::array::{ArrayRef, RecordBatch};

use crate::decode::{first_lengths, shapes};
use crate::footer::{Footer, SHAPE};
use crate::form::{Form, Leaf, Stored, shape_numel};
use crate::{DataError, Shapes};

/// How a data set's latents are stored.
pub(crate) struct Layout {
    pub shapes: Shapes,
    /// The shape of all rows; empty where rows have shapes of their own.
    pub shape: Vec<usize>,
    /// The latent columns, in the order of [`crate::RowBlock`].
    pub stored: Vec<Stored>,
    /// Whether the shape column says the shapes of the rows.
    pub has_shape_column: bool,
}

/// Whether the types leave something open that only a row tells.
pub(crate) fn needs_first_row(first: &Footer) -> bool {
    let open = |form: &Form| form.levels.iter().any(Option::is_none) || form.leaf == Leaf::Bytes(None);
    first.has_shape_column || first.latents.iter().any(|(_, form)| open(form))
}

/// Settles the shape and the layout of each latent column. `first_row` is the first row where [`needs_first_row`];
/// `variable` asks for the shapes of nested lists to be taken row by row, whatever the first one has.
pub(crate) fn settle(
    first: &Footer,
    first_row: Option<&RecordBatch>,
    shape_column: &str,
    variable: bool,
) -> Result<Layout, DataError> {
    let (name, form) = &first.latents[0];
    let refuse = |reason: String| DataError::Metadata { file: first.file.name.clone(), key: SHAPE.into(), reason };
    let value = |name: &str| -> Option<&ArrayRef> { first_row.and_then(|batch| batch.column_by_name(name)) };
    let lengths = |name: &str, form: &Form| match value(name) {
        Some(array) => first_lengths(array),
        None => form.levels.iter().copied().flatten().collect(),
    };
    let nested = form.levels.len() > 1;
    let of_first_list = || {
        let shape = lengths(name, form);
        if shape.len() == form.levels.len() && shape_numel(&shape).is_some() {
            return Ok(shape);
        }
        Err(refuse(format!(
            "is absent, and the first row of column `{name}` has lists of lengths {shape:?}; expected {} positive lengths",
            form.levels.len()
        )))
    };
    let of_shape_column = || match value(shape_column).map(shapes) {
        Some(Ok(shapes)) if shapes.len() == 1 => Ok(shapes.into_iter().next().unwrap_or_default()),
        Some(Err(bad)) => Err(first.row_error(0, shape_column, bad.found, bad.expected)),
        _ => Err(refuse(format!("leaves dimensions open, and column `{shape_column}` cannot be read"))),
    };
    let told = first.shape()?;
    let fixed: Option<Vec<usize>> = told.as_ref().and_then(|dims| dims.iter().copied().collect());
    let (shapes, shape, has_shape_column) = match (told, fixed) {
        (_, Some(shape)) => (Shapes::Same, shape, false),
        (told, None) if first.has_shape_column => {
            let shape = of_shape_column()?;
            (Shapes::Variable(told.unwrap_or_else(|| vec![None; shape.len()])), shape, true)
        }
        (Some(told), None) if nested => (Shapes::Variable(told), of_first_list()?, false),
        (Some(_), None) => {
            return Err(refuse(format!(
                "leaves dimensions open, and column `{name}` is {form}, which does not tell each row's; add a column `{shape_column}` with each row's shape as a list of integers"
            )));
        }
        (None, None) if nested && variable => {
            (Shapes::Variable(vec![None; form.levels.len()]), of_first_list()?, false)
        }
        (None, None) if nested => (Shapes::Same, of_first_list()?, false),
        (None, None) => {
            return Err(refuse(format!(
                "is absent, and column `{name}` is {form}, which does not tell the shape; write it as a JSON array such as [4,32,32]"
            )));
        }
    };
    let mut stored = Vec::new();
    for (name, form) in &first.latents {
        let first_len_bytes = if form.levels.is_empty() { lengths(name, form).first().copied() } else { None };
        let column = Stored::resolve(name, form, &shape, first.dtype()?, first_len_bytes)
            .map_err(|reason| refuse(format!("column `{name}` {reason}")))?;
        stored.push(if shapes == Shapes::Same { column } else { column.of_any_shape() });
    }
    let shape = if shapes == Shapes::Same { shape } else { Vec::new() };
    Ok(Layout { shapes, shape, stored, has_shape_column })
}
