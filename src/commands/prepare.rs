//! `ringtune prepare`: downloads or reads Dolly 15k, OASST1 and Alpaca and writes them as JSONL rows.

use clap::Command;

use crate::datasets::{PrepareSpec, Prepared, run as prepare};
use crate::error::Result;
use crate::say;
use crate::settings::Settings;

/// What its help says besides its flags.
pub fn about(clap: Command) -> Command {
    clap.about("Download data sets and write them as rows for sft: dolly15k.jsonl, oasst1_en.jsonl, alpaca.jsonl").after_help(
        "--source-dir reads copies that were fetched elsewhere: databricks-dolly-15k.jsonl (of databricks/databricks-dolly-15k), \
         2023-04-12_oasst_ready.trees.jsonl.gz (of OpenAssistant/oasst1), train-00000-of-00001-a09b74b3ef9c3b56.parquet (of tatsu-lab/alpaca). \
         HF_ENDPOINT and HF_TOKEN, HTTPS_PROXY, HTTP_PROXY and NO_PROXY are honoured. Licences: Dolly 15k CC BY-SA 3.0, \
         OASST1 Apache-2.0, Alpaca CC BY-NC 4.0.",
    )
}

/// Runs the command.
///
/// # Errors
/// As [`prepare`].
pub fn run(s: &Settings) -> Result<()> {
    let spec = PrepareSpec {
        datasets: s.prepare.datasets.clone(),
        output_dir: s.output_dir.clone().expect("clap requires it"),
        source_dir: s.prepare.source_dir.clone(),
        cache_dir: s.data.cache_dir.clone(),
        multi_turn: s.prepare.multi_turn,
        paths: s.prepare.paths,
    };
    for done in prepare(&spec)? {
        report(&done);
    }
    Ok(())
}

fn report(p: &Prepared) {
    let (output, source) = (p.output.display(), p.source.display());
    say::result(&format!("{output}: {} rows of {} records, from {source}", p.kept, p.records));
    for (reason, n) in &p.dropped {
        say::note(&format!("  dropped: {n} x {reason}"));
    }
}
