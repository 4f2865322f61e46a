//! Which of the named arrays of a sample are its latents.

use super::Names;
use super::array::Array;

/// The arrays of a sample that are its latents, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Roles {
    /// In the order of the latents.
    pub names: Vec<String>,
    kind: Kind,
    pub flipped: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Latent,
    /// Mean and log-variance in one array.
    Halved,
    MeanAndLogvar,
}

impl Roles {
    /// Looks for the given names, or the usual ones with `suffix` behind them, among those that are there. `bare` is one more
    /// usual name of a latent.
    ///
    /// # Errors
    /// With the words for a message.
    pub fn find(names: &Names, there: &[&str], suffix: &str, bare: Option<&str>) -> Result<Self, String> {
        let listed = || there.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let find = |given: Option<&str>, usual: &[&str]| -> Result<Option<String>, String> {
            let usual: Vec<String> = usual.iter().map(|name| format!("{name}{suffix}")).collect();
            let is_there = |name: &&str| there.contains(name);
            match given {
                Some(name) if is_there(&name) => Ok(Some(name.to_owned())),
                Some(name) => Err(format!("has no `{name}`; it has {}", listed())),
                None => Ok(usual.iter().map(String::as_str).find(is_there).map(str::to_owned)),
            }
        };
        let moments = find(names.moments.as_deref(), &["moments"])?;
        let mean = find(names.latent_mean.as_deref(), &["latent_mean", "mean"])?;
        let logvar = find(names.latent_logvar.as_deref(), &["latent_logvar", "logvar"])?;
        let latent = match find(names.latent.as_deref(), &["latent", "latents"])? {
            None => bare.filter(|name| there.contains(name)).map(str::to_owned),
            found => found,
        };
        let (kind, straight) = match (moments, mean, logvar, latent) {
            // What was asked for by name goes before what is there as well.
            (_, _, _, Some(latent)) if names.latent.is_some() => (Kind::Latent, vec![latent]),
            (Some(moments), ..) => (Kind::Halved, vec![moments]),
            (None, Some(mean), Some(logvar), _) => (Kind::MeanAndLogvar, vec![mean, logvar]),
            (None, _, _, Some(latent)) => (Kind::Latent, vec![latent]),
            _ => {
                return Err(format!(
                    "has {}, none of which is known to hold latents; say which with --column latent=NAME, moments=NAME, or latent_mean=NAME and latent_logvar=NAME",
                    listed()
                ));
            }
        };
        let given = names.latent_flipped.as_deref();
        let mirrored: Vec<Option<String>> = match kind {
            Kind::Latent => vec![find(given, &["latent_flipped", "latents_flip", "flipped"])?],
            Kind::Halved => vec![find(given, &["moments_flipped"])?],
            Kind::MeanAndLogvar => {
                let parts = ["mean", "logvar"].map(|part| match given {
                    Some(name) => find(Some(&format!("{name}_{part}{suffix}")), &[]),
                    None => find(None, &[&format!("latent_flipped_{part}")]),
                });
                parts.into_iter().collect::<Result<_, _>>()?
            }
        };
        let mirrored: Option<Vec<String>> = mirrored.into_iter().collect();
        let flipped = mirrored.is_some();
        Ok(Self { names: straight.into_iter().chain(mirrored.unwrap_or_default()).collect(), kind, flipped })
    }

    /// Whether the latents are posterior moments.
    pub fn moments(&self) -> bool {
        self.kind != Kind::Latent
    }

    /// The latents in an array of these roles.
    ///
    /// # Errors
    /// With the words for a message, if moments cannot be halved.
    pub fn latents(&self, array: Array) -> Result<Vec<Array>, String> {
        let array = array.of_one_sample();
        match self.kind {
            Kind::Halved => Ok(array.into_moments()?.into()),
            _ => Ok(vec![array]),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn usual_and_given_names_are_found() {
        let of = |there: &[&str]| Roles::find(&Names::default(), there, ".npy", Some("npy"));
        for (there, names, moments, flipped) in [
            (&["cls", "npy"][..], &["npy"][..], false, false),
            (&["flipped.npy", "latent.npy", "npy"], &["latent.npy", "flipped.npy"], false, true),
            (&["latent.npy", "moments.npy"], &["moments.npy"], true, false),
            (&["logvar.npy", "mean.npy"], &["mean.npy", "logvar.npy"], true, false),
        ] {
            let roles = of(there).unwrap();
            assert_eq!(roles.names, names);
            assert_eq!((roles.moments(), roles.flipped), (moments, flipped));
        }
        let names = Names { latent: Some("x".into()), ..Names::default() };
        assert_eq!(Roles::find(&names, &["moments", "x"], "", None).unwrap().names, ["x"]);
        let error = Roles::find(&names, &["moments"], "", None).unwrap_err();
        assert!(error.contains("no `x`") && error.contains("`moments`"), "{error}");
        assert!(of(&["jpg", "cls"]).unwrap_err().contains("`jpg`, `cls`"));
    }
}
