//! `ringtune bench`: how fast the kernels, whole steps and sums between ranks are, each result verified.

mod attention;
mod baseline;
mod case;
mod cases;
mod collectives;
mod copies;
mod decode;
mod demand;
mod head;
mod kernels;
mod optimiser;
mod options;
mod print;
mod products;
mod project;
mod project_weights;
mod remedy;
mod roofline;
mod rows;
pub mod shapes;
mod step;
mod timing;
mod values;
mod verify;

use clap::{ArgMatches, Command};

use super::device;
use crate::error::Result;
use options::{Options, Which, flags};

/// The command's flags.
pub fn command() -> Command {
    let kernels = Command::new("kernels")
        .about("Time every kernel on the shapes of a model, against what a copy and the best product reach in the same run")
        .after_help(
            "Each case is first held to f64 on samples; a wrong result ends the command with 1. On an emulated GPU nothing is timed: the \
             table has the emulator's counters, and a projection from the data sheet.",
        );
    let step = Command::new("step")
        .about("Time whole training steps, full and LoRA: tokens a second, share of the peak, memory, launches and waits")
        .after_help(
            "The first loss is held to what random weights give, and losses have to fall. On an emulated GPU nothing is timed: the table has \
             counters and a projection from the data sheet.",
        );
    Command::new("bench")
        .about("Measure kernels, whole training steps or sums between ranks; results are verified first")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(flags(kernels, Which::Kernels))
        .subcommand(flags(step, Which::Step))
        .subcommand(collectives::command())
}

/// Measures and prints.
///
/// # Errors
/// If a flag makes no sense, the device fails, a result is wrong or memory is too small.
pub fn run(m: &ArgMatches) -> Result<()> {
    let (name, m) = m.subcommand().expect("clap requires one");
    if name == "collectives" {
        return collectives::run(m);
    }
    let which = if name == "step" { Which::Step } else { Which::Kernels };
    let options = Options::new(m, which)?;
    match which {
        Which::Kernels => {
            device::run(&options.device, options.threads, kernels::Bench { options: &options, no_gpu: None })
        }
        Which::Step => step::run(&options),
    }
}
