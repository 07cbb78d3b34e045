//! Flags with which a step fits into the memory there is.

use super::case::Setup;
use super::demand::{What, estimated};
use super::options::{Options, dtype_word};
use crate::error::Result;
use crate::model::Recompute;
use crate::text::bytes;

/// The mildest change with which a case takes at most `free` bytes, in words: fewer tokens, then recomputed layers as well, then fewer
/// layers.
///
/// # Errors
/// Those of [`estimated`].
pub fn flags(what: What, o: &Options, setup: &Setup, own_memory: bool, free: u64) -> Result<String> {
    let halves =
        |n: usize, least: usize| std::iter::successors(Some(n), |n| Some(n / 2)).take_while(move |&n| n >= least);
    let layers = setup.config.n_layers;
    for n_layers in halves(layers, 1) {
        for recompute in [o.recompute, Recompute::Layer] {
            for tokens in halves(setup.tokens, 64.min(setup.tokens)) {
                let with = Options { recompute, ..o.clone() };
                let mut smaller = Setup { tokens, document: setup.document.min(tokens), ..setup.clone() };
                smaller.config.n_layers = n_layers;
                let needed = estimated(what, &with, &smaller, own_memory)?;
                if needed > free {
                    continue;
                }
                let mut flags = Vec::new();
                flags.extend((tokens != setup.tokens).then(|| format!("--tokens {tokens}")));
                flags.extend((recompute != o.recompute).then(|| "--recompute layer".to_string()));
                flags.extend((n_layers != layers).then(|| format!("--layers {n_layers}")));
                return Ok(format!("{} takes {}", flags.join(" "), bytes(needed)));
            }
        }
    }
    let lora = if what == What::Full { ", or --only lora" } else { "" };
    Ok(format!("use a smaller --model{lora}; one layer of this one in {} is too much", dtype_word(setup.dtype)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::options::{Which, flags as clap_flags};
    use crate::commands::bench::shapes::Shape;

    fn options(words: &[&str]) -> Options {
        let m = clap_flags(clap::Command::new("step"), Which::Step);
        Options::new(&m.get_matches_from([&["step"], words].concat()), Which::Step).unwrap()
    }

    /// Each remedy fits, and the mildest comes first.
    #[test]
    fn what_is_advised_fits() {
        let o = options(&["--device", "cpu"]);
        let setup = Setup { config: Shape::EightB.config(None), tokens: 8192, document: 2048, dtype: o.dtype };
        let needed = |what| estimated(what, &o, &setup, false).unwrap();
        let advice = |what, free| flags(what, &o, &setup, false, free).unwrap();
        let lora = needed(What::Lora);
        assert!((30..60).contains(&(lora >> 30)), "{lora}");
        assert!(advice(What::Lora, lora - 1).starts_with("--tokens 4096 takes "));
        // Every weight of 8B in bf16 with masters: 18 bytes each.
        assert!(needed(What::Full) > 18 * 8_030_261_248);
        let fewer = advice(What::Full, 80 << 30);
        assert!(fewer.starts_with("--tokens ") && fewer.contains("--layers 16"), "{fewer}");
        assert!(advice(What::Full, 1 << 20).contains("smaller --model"));
    }
}
