//! Resolved settings as the training loop takes them.

use super::{Command, Origin, Resolved, Value};
use crate::settings::{
    EarlyStopping, Every, GenTest, LoraSettings, LrSchedule, Precision, Recompute, ResolvedSetting, Resume,
    TrainSettings, Warmup,
};

impl Resolved {
    /// The settings of `pretrain` or `sft`; ranges were checked when the values were read.
    pub fn train_settings(&self) -> TrainSettings {
        let sft = self.command() != Command::Pretrain;
        let number = |key: &str| self.float(key).expect("the setting has a default");
        let count = |key: &str| self.int(key).expect("the setting has a default");
        TrainSettings {
            learning_rate: self.float("learning_rate"),
            epochs: count("num_train_epochs"),
            max_steps: self.int("max_steps"),
            micro_batch_size: count("per_device_train_batch_size") as usize,
            grad_accum: count("gradient_accumulation_steps") as usize,
            eval_batch_size: count("per_device_eval_batch_size") as usize,
            max_seq_len: self.int("max_seq_len").map(|n| n as usize),
            lr_schedule: match self.text("lr_scheduler_type") {
                Some("linear") => LrSchedule::Linear,
                Some("constant") => LrSchedule::Constant,
                Some("wsd") => LrSchedule::Wsd,
                _ => LrSchedule::Cosine,
            },
            min_lr_ratio: number("min_lr_ratio"),
            wsd_decay_ratio: number("wsd_decay_ratio"),
            warmup: self.warmup(),
            warmup_from_zero: self.bool("warmup_from_zero"),
            weight_decay: number("weight_decay"),
            max_grad_norm: self.float("max_grad_norm").filter(|&x| x > 0.0),
            adam_beta1: number("adam_beta1"),
            adam_beta2: number("adam_beta2"),
            adam_eps: number("adam_epsilon"),
            seed: count("seed"),
            precision: match self.text("mixed_precision") {
                Some("bf16") => Precision::Bf16,
                _ => Precision::F32,
            },
            recompute: match self.text("recompute") {
                Some("attention") => Recompute::Attention,
                Some("layer") => Recompute::Layer,
                _ => Recompute::None,
            },
            lora: (sft && self.bool("use_lora")).then(|| self.lora()),
            eval_every: self.eval_every(),
            eval_on_start: self.bool("eval_on_start"),
            save_every: match self.text("save_strategy") {
                Some("no") => Every::Never,
                Some("epoch") => Every::Epoch,
                _ => Every::Steps(count("save_steps")),
            },
            save_total_limit: self.int("save_total_limit").map(|n| n as usize),
            logging_steps: count("logging_steps"),
            early_stopping: self.int("early_stopping_patience").map(|patience| EarlyStopping {
                patience: u32::try_from(patience).unwrap_or(u32::MAX),
                threshold: number("early_stopping_threshold"),
            }),
            load_best_at_end: self.bool("load_best_model_at_end"),
            max_bad_steps: u32::try_from(count("max_bad_steps")).unwrap_or(u32::MAX),
            gen_test: (sft && self.bool("do_gen_test")).then(|| GenTest {
                num_samples: count("num_gen_samples") as usize,
                max_new_tokens: count("max_new_tokens") as usize,
                temperature: number("gen_temperature") as f32,
                top_p: number("gen_top_p") as f32,
            }),
            merge_adapters: sft && self.bool("use_lora") && self.bool("merge_adapters"),
            resume: match self.text("resume_from_checkpoint") {
                None => Resume::No,
                Some("auto") => Resume::Auto,
                Some(path) => Resume::Path(path.into()),
            },
            allow_changed: self.texts("allow_changed"),
            threads: self.int("threads").map(|n| n as usize),
            tensorboard: self.bool("tensorboard"),
            quiet: self.bool("quiet"),
        }
    }

    /// One line for each setting of the table at the start of a run, in the table's order.
    pub fn resolved_settings(&self) -> Vec<ResolvedSetting> {
        let line = |(setting, value, origin): (&super::Setting, Option<&Value>, &Origin)| ResolvedSetting {
            name: setting.key.into(),
            value: value.map_or_else(|| format!("({})", setting.unset), Value::to_string),
            origin: match origin {
                Origin::Default => "default".into(),
                Origin::File(name) => name.clone(),
                Origin::Flag => format!("--{}", setting.flag()),
            },
        };
        self.entries().map(line).collect()
    }

    fn lora(&self) -> LoraSettings {
        let r = self.int("lora_r").expect("the setting has a default") as usize;
        LoraSettings {
            r,
            alpha: self.float("lora_alpha").unwrap_or(2.0 * r as f64),
            dropout: self.float("lora_dropout").expect("the setting has a default"),
            rslora: self.bool("use_rslora"),
            targets: self.texts("lora_targets"),
            plus_ratio: self.float("loraplus_lr_ratio"),
        }
    }

    /// Ratio or steps: a flag wins over the file; both from one place are refused before.
    fn warmup(&self) -> Warmup {
        let ratio = self.float("warmup_ratio").expect("the setting has a default");
        match self.int("warmup_steps") {
            Some(steps) if *self.origin("warmup_ratio") != Origin::Flag => Warmup::Steps(steps),
            _ => Warmup::Ratio(ratio),
        }
    }

    fn eval_every(&self) -> Every {
        let strategy_wins = *self.origin("eval_steps") != Origin::Flag;
        match (self.text("eval_strategy"), self.int("eval_steps")) {
            (Some("no"), _) if strategy_wins => Every::Never,
            (Some("epoch"), _) if strategy_wins => Every::Epoch,
            (_, Some(n)) => Every::Steps(n),
            (Some("no"), None) => Every::Never,
            (_, None) => Every::Epoch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Typed, find};
    use super::*;

    fn sft(flags: &[(&str, &str)]) -> Resolved {
        let typed: Typed =
            flags.iter().map(|(k, v)| (find(k).unwrap(), v.split(' ').map(String::from).collect())).collect();
        Resolved::new(Command::Sft, typed, None).unwrap()
    }

    /// Two definitions of the defaults exist: the loop's, for its tests, and the table's, for users. They must agree.
    #[test]
    fn defaults_are_those_of_the_loop() {
        assert_eq!(sft(&[]).train_settings(), TrainSettings::default());
    }

    #[test]
    fn alpha_follows_the_rank() {
        let s = sft(&[("lora_r", "4")]).train_settings().lora.unwrap();
        assert_eq!((s.r, s.alpha), (4, 8.0));
    }

    #[test]
    fn every_value_arrives() {
        let s = sft(&[("use_lora", "false"), ("warmup_steps", "7"), ("eval_steps", "5"), ("max_grad_norm", "0")]);
        let s = s.train_settings();
        assert_eq!((s.lora, s.warmup, s.eval_every), (None, Warmup::Steps(7), Every::Steps(5)));
        assert_eq!(s.max_grad_norm, None);
    }
}
