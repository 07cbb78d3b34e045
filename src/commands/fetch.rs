//! Names of the hub among the paths that the user typed: what they stand for is fetched, or found in the cache, and takes their place.
//! What lies here under a name is always that.

use std::borrow::Cow;
use std::path::{Component, Path, PathBuf};

use super::did_you_mean;
use super::jobs::{PretrainJob, SftJob};
use crate::error::{Error, Result};
use crate::hf::peft::Adapter;
use crate::hub::{DataName, Fetched, Hub, PREFIX, Part, Repo, snapshot_in};
use crate::say;
use crate::settings::{Command, Settings};

/// How names are looked up.
#[derive(Clone, Copy)]
pub struct Lookup<'a> {
    /// Another process of this run on this machine has just looked them up.
    pub settled: bool,
    /// Told as bytes come.
    pub moved: &'a dyn Fn(u64),
}

/// Who is alone.
pub const ALONE: Lookup<'static> = Lookup { settled: false, moved: &|_| {} };

/// A model's folder, and the hub's name where it came by one.
pub type Named = (PathBuf, Option<Repo>);

impl Lookup<'_> {
    fn hub(&self) -> Result<Hub<'_>> {
        let mut hub = Hub::from_env()?;
        (hub.settled, hub.moved) = (self.settled, self.moved);
        Ok(hub)
    }

    /// The folder that `path` names: itself, the snapshot of a folder of the hub's cache, or what the hub has under this name.
    ///
    /// # Errors
    /// As [`Hub::model`].
    pub fn model(&self, path: &Path, part: Part) -> Result<Named> {
        if path.exists() {
            return Ok((of_cache(path).into_owned(), None));
        }
        refuse_address(path, "", "a folder")?;
        let Some(repo) = repo_of(path) else { return Ok((path.to_path_buf(), None)) };
        let fetched = self.hub()?.model(&repo, part).map_err(|e| meant(path, e))?;
        say_which(&repo, &fetched);
        Ok((fetched.dir, Some(repo)))
    }

    /// The files that names of data sets stand for, and the weights of these: a data set of several files shares its weight out among
    /// them by their lengths.
    ///
    /// # Errors
    /// As [`Hub::data`]; a usage error for a name that lacks the prefix.
    pub fn data(&self, paths: &[PathBuf], weights: Option<&[f64]>) -> Result<(Vec<PathBuf>, Option<Vec<f64>>)> {
        let (mut files, mut shares) = (Vec::new(), Vec::new());
        for (i, path) in paths.iter().enumerate() {
            let weight = weights.and_then(|w| w.get(i)).copied().unwrap_or(1.0);
            let Some(name) = data_name(path)? else {
                files.push(path.clone());
                shares.push(weight);
                continue;
            };
            let fetched = self.hub()?.data(&name)?;
            say_which(&name.repo, &fetched);
            let sizes: Vec<f64> =
                fetched.files.iter().map(|f| f.metadata().map_or(1, |m| m.len().max(1)) as f64).collect();
            let all: f64 = sizes.iter().sum();
            shares.extend(sizes.iter().map(|size| weight * size / all));
            files.extend(fetched.files);
        }
        // Weights of another number are left as they are: who counts them names the files.
        let shared = weights.map(|w| if w.len() == paths.len() { shares } else { w.to_vec() });
        Ok((files, shared))
    }

    /// Puts folders and files in the place of the hub's names.
    ///
    /// # Errors
    /// As [`Lookup::model`] and [`Lookup::data`].
    pub fn settings(&self, command: Command, s: &mut Settings) -> Result<()> {
        // Looking at rows needs no weights.
        let part = if command == Command::Inspect { Part::Tokenizer } else { Part::Whole };
        for (path, part) in
            [(&mut s.model.path, part), (&mut s.model.base, part), (&mut s.model.tokenizer, Part::Tokenizer)]
        {
            if let Some(path) = path {
                *path = self.model(path, part)?.0;
            }
        }
        let (paths, weights) = self.data(&s.data.paths, s.data.weights.as_deref())?;
        (s.data.paths, s.data.weights) = (paths, weights);
        s.data.val_paths = self.data(&s.data.val_paths, None)?.0;
        Ok(())
    }

    /// A fine-tuning with folders and files in the place of the hub's names; the base's name where it came by one.
    ///
    /// # Errors
    /// As [`Lookup::settings`].
    pub fn sft(&self, job: &SftJob) -> Result<(SftJob, Option<Repo>)> {
        let mut job = job.clone();
        let (dir, name) = self.model(&job.model_path, Part::Whole)?;
        job.model_path = dir;
        job.tokenizer_path =
            job.tokenizer_path.map(|p| Ok::<_, Error>(self.model(&p, Part::Tokenizer)?.0)).transpose()?;
        (job.data.paths, job.data.weights) = self.data(&job.data.paths, job.data.weights.as_deref())?;
        job.data.val_paths = self.data(&job.data.val_paths, None)?.0;
        Ok((job, name))
    }

    /// As [`Lookup::sft`], of a pretraining.
    ///
    /// # Errors
    /// As [`Lookup::settings`].
    pub fn pretrain(&self, job: &PretrainJob) -> Result<PretrainJob> {
        let mut job = job.clone();
        job.tokenizer_path = self.model(&job.tokenizer_path, Part::Tokenizer)?.0;
        (job.data.paths, job.data.weights) = self.data(&job.data.paths, job.data.weights.as_deref())?;
        job.data.val_paths = self.data(&job.data.val_paths, None)?.0;
        Ok(job)
    }

    /// The folder of an adapter's base: `given`, or the one that its configuration names, here or on the hub.
    ///
    /// # Errors
    /// If it is neither here nor on the hub.
    pub fn base(&self, adapter: &Adapter, given: Option<&Path>) -> Result<PathBuf> {
        let config = &adapter.config;
        let revision = config.revision.as_ref().map(|r| format!("@{r}")).unwrap_or_default();
        match Repo::model(&format!("{}{revision}", config.base)) {
            Some(repo) if given.is_none() && adapter.local_base()?.is_none() => {
                let fetched = self.hub()?.model(&repo, Part::Whole).map_err(|e| {
                    let place = adapter.dir().join(crate::hf::peft::CONFIG);
                    let hint = "name the base's folder with --base-model";
                    Error::new(format!("{}: base_model_name_or_path {:?}: {e}; {hint}", place.display(), config.base))
                })?;
                say_which(&repo, &fetched);
                Ok(fetched.dir)
            }
            _ => adapter.find_base(given),
        }
    }
}

fn say_which(repo: &Repo, fetched: &Fetched) {
    say::remark(&format!("{}: commit {}", repo.typed(), &fetched.commit[..fetched.commit.len().min(12)]));
}

/// The snapshot, where a path is a folder of the hub's cache.
fn of_cache(path: &Path) -> Cow<'_, Path> {
    match snapshot_in(path) {
        Some(snapshot) if !path.join("config.json").is_file() => {
            say::note(&format!(
                "{}: a folder of the hub's cache; {} of it is taken",
                path.display(),
                snapshot.display()
            ));
            Cow::Owned(snapshot)
        }
        _ => Cow::Borrowed(path),
    }
}

/// The model of the hub that a path which is not here is the name of. Where its first part is a folder here, a file or folder in that was
/// meant.
fn repo_of(path: &Path) -> Option<Repo> {
    let text = path.to_str()?;
    let beside = matches!(path.components().next(), Some(Component::Normal(first)) if Path::new(first).is_dir());
    Repo::model(text).filter(|_| text.starts_with(PREFIX) || !beside)
}

fn data_name(path: &Path) -> Result<Option<DataName>> {
    if path.exists() {
        return Ok(None);
    }
    refuse_address(path, PREFIX, "files")?;
    let Some(text) = path.to_str() else { return Ok(None) };
    if let (None, Some(repo)) = (text.strip_prefix(PREFIX), repo_of(path)) {
        return Err(Error::usage(format!(
            "{text}: no such file or folder; a data set of the hub is written {PREFIX}{repo}"
        )));
    }
    DataName::parse(text)
}

/// An address is no name: of a page of the hub it is said which name it has, with `prefix` in front.
fn refuse_address(path: &Path, prefix: &str, here: &str) -> Result<()> {
    let Some((text, (scheme, rest))) = path.to_str().and_then(|text| Some((text, text.split_once("://")?))) else {
        return Ok(());
    };
    let endpoint = crate::hub::endpoint();
    let of_hub = ["https://huggingface.co/", "https://hf.co/"].into_iter().find_map(|hub| text.strip_prefix(hub));
    let page = text.strip_prefix(&format!("{endpoint}/")).or(of_hub).or((scheme == "hf").then_some(rest));
    let names: Vec<&str> = page.unwrap_or_default().trim_start_matches("datasets/").splitn(6, '/').collect();
    let advice = match names[..] {
        [org, name, ref more @ ..] if !org.is_empty() && !name.is_empty() => {
            let revision = match more {
                [view, revision, ..] if ["tree", "blob", "resolve"].contains(view) && *revision != "main" => {
                    format!("@{revision}")
                }
                _ => String::new(),
            };
            format!("write {prefix}{org}/{name}{revision}")
        }
        _ => format!("fetch it first, and name {here} here"),
    };
    Err(Error::usage(format!("{text}: an address, expected a path or a name of the hub; {advice}")))
}

/// An error about a name without a prefix says first that nothing of this name lies here.
fn meant(path: &Path, e: Error) -> Error {
    match path.to_str().is_some_and(|text| text.starts_with(PREFIX)) {
        true => e,
        false => {
            let e = e.context(format!("{}: no folder of this name here, and on the hub", path.display()));
            did_you_mean::model(e, path, false)
        }
    }
}
