//! Column names as people type them after `--column`.

use crate::Columns;

impl Columns {
    /// The default names but for those given as `KEY=NAME`, with the keys of `[data.columns]`.
    ///
    /// # Errors
    /// In words that name the pair, if it is none or the key is not known.
    pub fn from_pairs(pairs: &[String]) -> Result<Self, String> {
        let mut columns = Self::default();
        for pair in pairs {
            let (key, name) = pair.split_once('=').ok_or_else(|| format!("--column {pair}: expected KEY=NAME"))?;
            let column = match key {
                "latent" => &mut columns.latent,
                "latent_mean" => &mut columns.latent_mean,
                "latent_logvar" => &mut columns.latent_logvar,
                "latent_flipped" => &mut columns.latent_flipped,
                "label" => &mut columns.label,
                "id" => &mut columns.id,
                "shape" => &mut columns.shape,
                "caption" => &mut columns.caption,
                "caption_mask" => &mut columns.caption_mask,
                _ => {
                    return Err(format!(
                        "--column {pair}: unknown key `{key}`; expected latent, latent_mean, latent_logvar, latent_flipped, label, id, shape, caption or caption_mask"
                    ));
                }
            };
            *column = name.to_owned();
        }
        Ok(columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_replace_the_names_that_they_give() {
        let pairs = ["latent_mean=mu", "label=y=z"].map(str::to_owned);
        let expected = Columns { latent_mean: "mu".into(), label: "y=z".into(), ..Columns::default() };
        assert_eq!(Columns::from_pairs(&pairs), Ok(expected));
        for (pair, words) in [("latent", "KEY=NAME"), ("lable=y", "unknown key `lable`")] {
            let error = Columns::from_pairs(&[pair.to_owned()]);
            assert!(error.is_err_and(|error| error.contains(words) && error.contains(pair)));
        }
    }
}
