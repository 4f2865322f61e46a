//! How caption embeddings are stored: which columns, tokens × dim how, settled from a footer and the first row.

use arrow::array::RecordBatch;

use crate::DataError;
use crate::decode::first_lengths;
use crate::footer::{CAPTION_DTYPE, CAPTION_SHAPE, Footer};
use crate::form::{Dtype, Form, Leaf};

/// What a data set says about its captions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptionMeta {
    /// Numbers of a token.
    pub dim: usize,
    /// Most tokens of a caption, where the metadata or the types say it.
    pub most_tokens: Option<usize>,
    /// Captions of every row, where the columns or the metadata say it.
    pub per_row: Option<usize>,
    /// The number type.
    pub dtype: Dtype,
    /// Whether a mask is stored with each.
    pub masked: bool,
}

impl CaptionMeta {
    /// Bytes of the captions of a row, as far as the metadata tells.
    pub(crate) fn row_bytes(&self) -> usize {
        self.per_row.unwrap_or(1) * self.most_tokens.unwrap_or(1) * self.dim * self.dtype.bytes()
    }
}

/// The caption columns with everything that decoding takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CaptionLayout {
    pub meta: CaptionMeta,
    pub columns: Vec<CaptionColumn>,
    /// How a value tells its captions and tokens.
    pub nesting: Nesting,
}

/// A column, and the one with its masks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CaptionColumn {
    pub name: String,
    pub mask: Option<String>,
}

/// How a value tells its captions and tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nesting {
    /// Lists of captions, of tokens, of numbers.
    Captions,
    /// Lists of tokens, of numbers.
    Tokens,
    /// Numbers or bytes of one caption.
    One,
    /// Numbers or bytes of so many captions of so many tokens.
    Several(usize, usize),
}

impl CaptionLayout {
    /// Whether only a row tells how many numbers a token has.
    pub fn needs_first_row(first: &Footer) -> bool {
        let Some((_, form)) = first.captions.first() else { return false };
        let told = first.caption_shape().ok().flatten().and_then(|dims| dims.last().copied().flatten());
        form.levels.len() > 1 && form.levels.last().copied().flatten().or(told).is_none()
    }

    /// Settles the layout; `None` without caption columns. `first_row` is the first row of the data set where
    /// [`CaptionLayout::needs_first_row`].
    pub fn settle(first: &Footer, first_row: Option<&RecordBatch>) -> Result<Option<Self>, DataError> {
        let Some((name, form)) = first.captions.first() else { return Ok(None) };
        let refuse = |reason: String| {
            let (file, key) = (first.file.name.clone(), CAPTION_SHAPE.to_owned());
            DataError::Metadata { file, key, reason: format!("column `{name}` is {form}; {reason}") }
        };
        let told = first.caption_shape()?;
        let nesting = match (form.levels.len(), told.as_deref()) {
            (3, _) => Nesting::Captions,
            (2, _) => Nesting::Tokens,
            (0 | 1, Some([_, _])) => Nesting::One,
            (0 | 1, Some([Some(captions), Some(tokens), _])) => Nesting::Several(*captions, *tokens),
            (0 | 1, _) => {
                return Err(refuse("write the key as [tokens, dim], the most tokens of a caption and the numbers of a token, or [captions, tokens, dim]".into()));
            }
            (depth, _) => {
                return Err(refuse(format!("it nests {depth} lists; expected [captions][tokens][dim] at most")));
            }
        };
        let lengths = first_row.and_then(|batch| batch.column_by_name(name)).map(first_lengths).unwrap_or_default();
        let of_type = || form.levels.last().copied().flatten();
        let of_first = || lengths.get(form.levels.len().checked_sub(1)?).copied();
        let dim = told.as_ref().and_then(|dims| dims.last().copied().flatten());
        let dim = match nesting {
            Nesting::One | Nesting::Several(..) => dim,
            Nesting::Captions | Nesting::Tokens => dim.or_else(of_type).or_else(of_first),
        };
        let Some(dim) = dim.filter(|dim| *dim > 0) else {
            return Err(refuse("neither the key nor the first row tells how many numbers a token has".into()));
        };
        let told_dim = |at: usize| told.as_ref().and_then(|dims| dims.len().checked_sub(at).and_then(|at| dims[at]));
        // Where every column fixes the number, the largest.
        let tokens_of = |form: &Form| form.levels[form.levels.len().checked_sub(2)?];
        let of_types =
            || first.captions.iter().map(|(_, form)| tokens_of(form)).try_fold(0, |most, of| Some(of?.max(most)));
        let several_columns = (first.captions.len() > 1).then_some(first.captions.len());
        let dtype = match form.leaf {
            Leaf::F16 => Dtype::F16,
            Leaf::F32 | Leaf::F64 => Dtype::F32,
            Leaf::Bytes(_) => match first.keys.get(CAPTION_DTYPE) {
                None => Dtype::F16,
                Some(_) => first.caption_dtype()?.unwrap_or(Dtype::F16),
            },
        };
        let meta = CaptionMeta {
            dim,
            most_tokens: told_dim(2).or_else(of_types),
            per_row: match nesting {
                Nesting::Captions => told_dim(3).or(form.levels[0]),
                Nesting::Several(captions, _) => Some(captions),
                Nesting::Tokens | Nesting::One => several_columns.or(Some(1)),
            },
            dtype,
            masked: !first.caption_masks.is_empty(),
        };
        let kind = |form: &Form| (form.levels.len(), std::mem::discriminant(&form.leaf));
        if let Some((other, of_other)) = first.captions.iter().find(|(_, other)| kind(other) != kind(form)) {
            return Err(refuse(format!("`{other}` is {of_other}; they must be alike")));
        }
        let (columns, masks) = (first.captions.len(), &first.caption_masks);
        if !masks.is_empty() && masks.len() != columns {
            return Err(refuse(format!("there are {columns} such columns, but masks only in {}", masks.join(", "))));
        }
        if several_columns.is_some() && matches!(nesting, Nesting::Captions | Nesting::Several(..)) {
            return Err(refuse("columns that are numbered hold one caption each".into()));
        }
        let masks = first.caption_masks.iter().cloned().map(Some).chain(std::iter::repeat(None));
        let columns =
            first.captions.iter().zip(masks).map(|((name, _), mask)| CaptionColumn { name: name.clone(), mask });
        Ok(Some(Self { meta, columns: columns.collect(), nesting }))
    }
}

/// The caption columns of a file and those of their masks: the one that is named, or `…_1`, `…_2` and so on.
pub(crate) type CaptionColumns = (Vec<(String, Form)>, Vec<String>);

/// Finds them among the columns that `form` knows the type of; `Err` with the words for a message.
pub(crate) fn find(
    caption: &str,
    mask: &str,
    has: impl Fn(&str) -> bool,
    form: impl Fn(&str) -> Result<Form, DataError>,
) -> Result<CaptionColumns, DataError> {
    let numbered = |name: &str| -> Vec<String> {
        (1..).map(|number| format!("{name}_{number}")).take_while(|name| has(name)).collect()
    };
    let names = |name: &str| if has(name) { vec![name.to_owned()] } else { numbered(name) };
    let captions = names(caption).into_iter().map(|name| Ok((name.clone(), form(&name)?)));
    let captions: Vec<(String, Form)> = captions.collect::<Result<_, DataError>>()?;
    let masks = if captions.is_empty() { Vec::new() } else { names(mask) };
    Ok((captions, masks))
}
