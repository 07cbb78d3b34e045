//! What lies in a model folder, for `eval`, `generate` and `merge`: a whole model, or an adapter and the base it belongs to.

use std::path::{Path, PathBuf};

use super::did_you_mean::{self, has_weights};
use super::fetch::ALONE;
use super::open::{self, TemplateArgs};
use super::start::plan_resize;
use crate::backend::Backend;
use crate::data::template::{Template, Unmarked};
use crate::data::tokenizer::{SpecialIds, Tokenizer};
use crate::error::{Error, Result};
use crate::hf::device::{load_adapter, load_params};
use crate::hf::merge::{Adapted, Merged};
use crate::hf::merged::lora_spec;
use crate::hf::peft::Adapter;
use crate::hf::resize::Resized;
use crate::hf::safetensors::ModelFiles;
use crate::hf::{TensorSource, peft};
use crate::model::Model;
use crate::say;
use crate::settings::Settings;
use crate::tensor::DType;
use crate::train::outputs::MERGED;

/// Which model, tokenizer and template a command was told.
#[derive(Clone, Debug)]
pub(super) struct ModelArgs {
    pub model_path: PathBuf,
    pub base_model: Option<PathBuf>,
    pub no_lora: bool,
    pub tokenizer_path: Option<PathBuf>,
    pub special_ids: SpecialIds,
    pub template: TemplateArgs,
    /// The template where none is named and none is saved with the model.
    pub default_template: &'static str,
    pub dtype: DType,
    pub seed: u64,
    pub quiet: bool,
}

impl ModelArgs {
    /// `unmarked`: what a template without generation marks is used for.
    pub fn of(s: &Settings, unmarked: Unmarked) -> Result<Self> {
        Ok(Self {
            model_path: s.model.path.clone().expect("clap requires it"),
            base_model: s.model.base.clone(),
            no_lora: s.model.no_lora,
            tokenizer_path: s.model.tokenizer.clone(),
            special_ids: SpecialIds::parse(&s.model.special_ids)?,
            // Where no loss is counted, nothing has to be masked.
            template: TemplateArgs { unmarked, ..TemplateArgs::of(s)? },
            default_template: "chatml",
            dtype: s.train.dtype,
            seed: s.train.seed,
            quiet: s.train.quiet,
        })
    }
}

/// A model folder, its files opened and checked.
pub(super) struct ModelFolder {
    /// The folder that was chosen: that of the adapter, or of the whole model.
    pub dir: PathBuf,
    /// The whole model, or the adapter's base.
    pub files: ModelFiles,
    /// The adapter on it.
    pub adapter: Option<Adapter>,
    /// The adapter is to be in the weights, as `merge` would write them.
    merged: bool,
}

impl ModelFolder {
    /// Opens what lies at `model_path`: an adapter with its base, or a whole model; with `no_lora` the merged model of an output
    /// folder, or the whole model in it, or the adapter for which [`ModelFolder::load`] makes the merged model in memory.
    pub fn open(model_path: &Path, base_model: Option<&Path>, no_lora: bool) -> Result<Self> {
        let shown = model_path.display();
        if !model_path.is_dir() {
            let found = if model_path.exists() { "a file" } else { "nothing" };
            let e = Error::new(format!("{shown}: expected a model folder, found {found}"));
            return Err(did_you_mean::model(e, model_path, false));
        }
        let holds = |dir: &Path, name: &str| dir.join(name).is_file();
        let whole = |dir: &Path| holds(dir, "config.json") && has_weights(dir);
        let merged = model_path.join(MERGED);
        let alone = peft::is_adapter(model_path) && !whole(model_path) && !whole(&merged);
        if (no_lora && !alone) || !peft::is_adapter(model_path) {
            if base_model.is_some() {
                return Err(Error::usage(format!(
                    "--base-model has no effect: {shown} {}; leave it out",
                    if no_lora { "is taken without its adapter (--no-lora)" } else { "holds no adapter" }
                )));
            }
            // Where an adapter lies beside a whole model, `merged` is what the adapter became.
            let places = match peft::is_adapter(model_path) {
                true => [merged.as_path(), model_path],
                false => [model_path, merged.as_path()],
            };
            let Some(dir) = places.into_iter().find(|d| whole(d)) else {
                // The message of a model that lacks a file says which.
                let files = ModelFiles::open(model_path);
                return Err(files.err().map_or_else(
                    || Error::new(format!("{shown}: no model")),
                    |e| did_you_mean::model(e, model_path, false),
                ));
            };
            if no_lora && dir == merged {
                say::note(&format!("model: {} (merged)", dir.display()));
            }
            return Ok(Self { dir: dir.to_path_buf(), files: ModelFiles::open(dir)?, adapter: None, merged: false });
        }
        if no_lora {
            say::note(&format!(
                "{shown}: no merged model is here; it is made in memory of adapter and base (`ringtune merge --model-path {shown} --output-dir {}` writes it)",
                merged.display()
            ));
        }
        let adapter = Adapter::open(model_path)?;
        let base = ALONE.base(&adapter, base_model)?;
        Ok(Self {
            dir: model_path.to_path_buf(),
            files: ModelFiles::open(&base)?,
            adapter: Some(adapter),
            merged: no_lora,
        })
    }

    /// What [`ModelFolder::open`] finds for these arguments, with its tokenizer and template.
    pub fn open_all(args: &ModelArgs) -> Result<(Self, Tokenizer, Template)> {
        let folder = Self::open(&args.model_path, args.base_model.as_deref(), args.no_lora)?;
        let mut tokenizer = folder.tokenizer(args)?;
        let folders = [folder.dir.as_path(), folder.files.dir()];
        let template = open::template(&args.template, &folders, args.default_template, &mut tokenizer)?;
        let asked = TemplateArgs { date: None, supervise_turn_newline: false, ..args.template.clone() };
        if let Some(name) = &args.template.name
            && let Ok(Some(own)) = open::own_template(&asked, &folders, &tokenizer)
            && !own.prints_as(&template)
        {
            say::warning(&format!(
                "{}: prompts are written as {name} writes them, and the model has another chat template; leave --prompt-template out for its own",
                folder.dir.display()
            ));
        }
        Ok((folder, tokenizer, template))
    }

    /// The tokenizer named, or the one of the folder, or of the base.
    fn tokenizer(&self, args: &ModelArgs) -> Result<Tokenizer> {
        let folders = [self.dir.as_path(), self.files.dir()];
        let tokenizer = open::tokenizer(args.tokenizer_path.as_deref(), &folders, args.special_ids)?;
        // One that lacks the tokens a training added is no matter here: rows for them are there.
        if args.tokenizer_path.is_some() {
            open::beside_own(&tokenizer, &folders, args.special_ids)?;
        }
        Ok(tokenizer)
    }

    /// Loads the weights. Rows for tokens that the model does not know are made as `sft` makes them before its first step.
    pub fn load<B: Backend>(&self, dev: &B, tokenizer: &Tokenizer, seed: u64, dtype: DType) -> Result<Model<B>> {
        self.files.hf_config().warnings.iter().for_each(|w| say::warning(w));
        let (merged, adapted);
        let source: &dyn TensorSource = match &self.adapter {
            Some(adapter) if self.merged => {
                merged = Merged::new(&self.files, adapter)?.rounded(self.files.dtype());
                &merged
            }
            Some(adapter) => {
                adapted = Adapted::new(&self.files, adapter)?;
                &adapted
            }
            None => &self.files,
        };
        let resize = plan_resize(source.config(), &self.dir, tokenizer, None, seed)?;
        if !resize.tokens.is_empty() {
            let names: Vec<&str> = resize.tokens.iter().filter_map(|t| tokenizer.piece(t.id as u32)).collect();
            say::warning(&format!(
                "{}: the model was not trained with {}; their rows are made from others, as at the start of sft",
                self.dir.display(),
                names.join(" and ")
            ));
        }
        let resized = Resized::new(source, resize)?;
        let mut params = load_params(dev, &resized, dtype)?;
        let beside = self.adapter.as_ref().filter(|_| !self.merged);
        if let Some(adapter) = beside {
            load_adapter(dev, &mut params, adapter)?;
        }
        Ok(Model::fixed(resized.config().clone(), params, beside.map(lora_spec), dtype))
    }
}
