//! `ringtune doctor`: the report whatever the machine has, broken libraries told apart from missing ones, exit codes.

use serde_json::Value;

use crate::program::{Outcome, Workplace};

fn report(outcome: &Outcome) -> Value {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}:\n{}", outcome.stdout))
}

/// Compiles a shared library of a few functions into a folder. `make` needs a C compiler anyway.
fn library(w: &Workplace, folder: &str, name: &str, source: &str) {
    w.write(&format!("{folder}/{name}.c"), source);
    let line = format!("cc -shared -fPIC -o {folder}/{name} {folder}/{name}.c");
    let outcome = w.shell(&line);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
}

#[test]
fn says_what_the_machine_has_and_how_to_get_the_rest() {
    let w = Workplace::new();
    let text = w.run(&["doctor"]);
    assert_eq!(text.code, Some(0), "{}", text.stderr);
    let names = ["processor", "memory", "cuda", "driver", "nvrtc", "nccl", "mpi", "cache", "used"];
    for name in names {
        assert!(text.stdout.lines().any(|l| l[2..].starts_with(name)), "no line {name} in:\n{}", text.stdout);
    }
    let json = report(&w.run(&["doctor", "--json"]));
    assert!(json["processor"]["threads"].as_u64().unwrap() > 0 && json["memory"]["bytes"].as_u64().unwrap() > 1 << 20);
    // The first GPU where it works; one that is emulated is for tests.
    let first = &json["gpu"][0];
    let gpu = first["works"] == true && first["emulated"] == false;
    assert_eq!(json["used"]["device"], if gpu { "cuda" } else { "cpu" }, "{json:#}");
    assert_eq!(json["used"]["no_gpu"].is_string(), !gpu, "{json:#}");
    // Which MPI carries gradients under mpirun is decided when the program is built.
    if json["mpi"]["works"] == true {
        assert_eq!(json["mpi"]["built_in"].as_str().is_some_and(|v| !v.is_empty()), cfg!(feature = "mpi"), "{json:#}");
    }
    let line = text.stdout.lines().find(|l| l[2..].starts_with("mpi")).unwrap();
    assert!(line.contains(if cfg!(feature = "mpi") { "was built with " } else { "was built without MPI" }), "{line}");
    // What does not work is said with a way to get it, and nothing else is.
    let missing: Vec<&str> = json["missing"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    for name in ["driver", "nvrtc", "nccl", "mpi"] {
        let works = json[name]["works"].as_bool().unwrap();
        assert_eq!(works, !missing.contains(&name), "{name} in {json:#}");
        if works {
            assert!(json[name]["path"].as_str().unwrap().starts_with('/'), "{name}");
        }
    }
}

#[test]
fn what_is_required_decides_the_exit_code() {
    let w = Workplace::new();
    let json = report(&w.run(&["doctor", "--json"]));
    for name in ["nccl", "mpi"] {
        let outcome = w.run(&["doctor", "--require", name]);
        let works = json[name]["works"].as_bool().unwrap();
        assert_eq!(outcome.code, Some(i32::from(!works)), "{name}: {}", outcome.stderr);
        if !works {
            assert!(
                outcome.error().starts_with(&format!("doctor: {name} is required: {name}: ")),
                "{}",
                outcome.error()
            );
        }
    }
    // A compiler that is not where the user says is never replaced by another.
    let outcome = w.shell("RINGTUNE_NVRTC=/no/such ringtune doctor --require cuda");
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.error().contains("nvrtc: RINGTUNE_NVRTC=/no/such: no such file or folder"), "{}", outcome.error());
    assert!(outcome.stdout.contains("RINGTUNE_NVRTC"), "the report comes first");
    let outcome = w.run(&["doctor", "--require", "nothing"]);
    assert_eq!(outcome.code, Some(2));
}

#[test]
fn an_old_driver_is_refused_with_its_version() {
    let w = Workplace::new();
    let source = "int cuInit(unsigned f) { return 0; }\nint cuDriverGetVersion(int *v) { *v = 11040; return 0; }\n";
    library(&w, "old", "libcuda.so", source);
    let json = report(&w.shell("LD_LIBRARY_PATH=$PWD/old ringtune doctor --json"));
    let error = json["driver"]["error"].as_str().unwrap();
    assert!(error.contains("supports CUDA 11.4, expected 12.0 or newer"), "{error}");
    assert_eq!(json["gpu"].as_array().unwrap().len(), 0);
}

/// Packages come without the development link, and an old library lacks what ranks call.
#[test]
fn nccl_is_found_under_the_name_that_packages_have() {
    let w = Workplace::new();
    let version = "int ncclGetVersion(int *v) { *v = 23203; return 0; }\n";
    let rest = ["GetUniqueId", "CommInitRankConfig", "CommGetAsyncError", "AllReduce", "ReduceScatter", "AllGather"];
    let rest =
        rest.iter().chain(&["Send", "Recv", "GroupStart", "GroupEnd", "CommFinalize", "CommDestroy", "GetErrorString"]);
    let whole: String = rest.map(|name| format!("int nccl{name}(void) {{ return 0; }}\n")).collect();
    library(&w, "old", "libnccl.so.2", version);
    library(&w, "new", "libnccl.so.2", &format!("{version}{whole}"));
    let of = |folder: &str| report(&w.shell(&format!("LD_LIBRARY_PATH=$PWD/{folder} ringtune doctor --json")));
    let json = of("new");
    // A system with one under the first name has that.
    if json["nccl"]["path"].as_str().is_some_and(|path| path.contains("/new/")) {
        assert_eq!(json["nccl"]["version"], "2.32.3", "{json:#}");
        let json = of("old");
        let error = json["nccl"]["error"].as_str().unwrap();
        assert!(error.contains("ncclGetUniqueId is missing; NCCL 2.14 or later is needed"), "{error}");
    } else {
        assert_eq!(json["nccl"]["works"], true, "{json:#}");
    }
}
