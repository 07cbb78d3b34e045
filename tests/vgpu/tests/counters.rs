//! Counters say exactly what the model of sectors and banks says, and the trace carries them.

use vgpu::exec::Class;
use vgpu::{Config, Counters, Memory, Module};

/// One warp moves 32 words, `stride` words apart, from global memory over shared memory, and stores them densely.
fn strided(stride: u32) -> Counters {
    let mut m = Memory::new();
    let module = Module::load(include_str!("cuda/races.ptx"), &mut m).unwrap();
    let words = 32 * stride as usize;
    let (x, y) = (m.alloc(words * 4).unwrap(), m.alloc(128).unwrap());
    m.write(x, &vec![0; words * 4]).unwrap();
    let config = Config { block: [32, 1, 1], ..Config::default() };
    let args: [&[u8]; 3] = [&x.to_le_bytes(), &y.to_le_bytes(), &stride.to_le_bytes()];
    module.launch("strided", &config, &args, &m).unwrap()
}

#[test]
fn dense_words_take_four_sectors_and_one_pass() {
    let c = strided(1);
    assert_eq!((c.global_requests, c.global_sectors), (2, 8));
    assert_eq!((c.global_read, c.global_written), (128, 128));
    assert_eq!((c.shared_wavefronts, c.bank_conflicts), (2, 0));
    assert_eq!(c.sectors_per_request(), 4.0);
    assert_eq!((c.tensor_flops, c.divergent_branches, c.barriers), (0, 0, 0));
}

#[test]
fn words_in_one_bank_and_in_sectors_of_their_own_are_seen() {
    // 32 words in one bank are 32 passes, 31 more than needed, on the way in and on the way out.
    let c = strided(32);
    assert_eq!((c.global_requests, c.global_sectors), (2, 32 + 4));
    assert_eq!((c.shared_wavefronts, c.bank_conflicts), (64, 62));
    assert_eq!((c.global_read, c.global_written), (128, 128));
    // Every second word: twice the sectors, two words a bank.
    let c = strided(2);
    assert_eq!((c.global_sectors, c.shared_wavefronts, c.bank_conflicts), (8 + 4, 4, 2));
    // An odd stride has no conflicts however far apart the words are.
    let c = strided(17);
    assert_eq!((c.global_sectors, c.bank_conflicts), (32 + 4, 0));
}

fn text(body: &str, block: u32) -> Counters {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 out) {{ .reg .b64 %p<4>; .reg .b32 %r<8>;
        .reg .pred %q<3>; .shared .align 16 .b8 sm[8192]; mov.u32 %r0, %tid.x; {body} ret; }}"
    );
    let mut m = Memory::new();
    let module = Module::load(&text, &mut m).unwrap();
    let out = m.alloc(65536).unwrap();
    let config = Config { block: [block, 1, 1], ..Config::default() };
    module.launch("k", &config, &[&out.to_le_bytes()], &m).unwrap()
}

#[test]
fn wide_accesses_are_served_in_groups_that_move_128_bytes() {
    // 16 bytes a lane: four groups of eight lanes, none of them in conflict when dense.
    let c = text("mov.u32 %r1, sm; mad.lo.u32 %r1, %r0, 16, %r1; st.shared.v4.u32 [%r1], {%r0, %r0, %r0, %r0};", 32);
    assert_eq!((c.shared_wavefronts, c.bank_conflicts), (4, 0));
    // 128 bytes apart: the eight lanes of a group want the same four banks.
    let c = text("mov.u32 %r1, sm; mad.lo.u32 %r1, %r0, 128, %r1; st.shared.v4.u32 [%r1], {%r0, %r0, %r0, %r0};", 32);
    assert_eq!((c.shared_wavefronts, c.bank_conflicts), (32, 28));
    // Eight lanes with global vectors of 16 bytes touch four sectors.
    let c = text(
        "ld.param.u64 %p0, [out]; mad.wide.u32 %p0, %r0, 16, %p0; st.global.v4.u32 [%p0], {%r0, %r0, %r0, %r0};",
        8,
    );
    assert_eq!((c.global_requests, c.global_sectors, c.global_written), (1, 4, 128));
}

#[test]
fn instructions_are_counted_by_class_lane_and_branch() {
    // Lanes below 8 go one way (two instructions), the others another (one); a guard leaves one lane.
    let c = text(
        "setp.lt.u32 %q0, %r0, 8; @%q0 bra A; add.u32 %r1, %r0, 1; bra END; A: add.u32 %r1, %r0, 2; add.u32 %r1, %r1, 3;
        END: setp.eq.u32 %q1, %r0, 5; @%q1 add.u32 %r1, %r1, 1; bar.sync 0;",
        64,
    );
    // The second warp has no lane below 8: it branches as one.
    let first = 1 + 1 + 1 + (1 + 1) + 2 + (1 + 1 + 1) + 1;
    let second = 1 + 1 + 1 + (1 + 1) + (1 + 1 + 1) + 1;
    assert_eq!(c.instructions.iter().sum::<u64>(), first + second);
    assert_eq!(c.divergent_branches, 1);
    assert_eq!((c.barriers, c.class(Class::Barrier)), (2, 2));
    assert_eq!(c.class(Class::Control), (1 + 1 + 1) + (1 + 1 + 1));
    // A guarded branch counts the lanes that take it.
    let lanes_first = 32 * 2 + 8 + 24 * 2 + 8 * 2 + 32 + 1 + 32 + 32;
    let lanes_second = 32 * 2 + 32 * 2 + 32 + 32 + 32;
    assert_eq!(c.lanes, lanes_first + lanes_second);
}

#[test]
fn the_trace_has_one_line_of_json_a_launch() {
    if std::env::var_os("VGPU_TRACE").is_some() {
        strided(32);
        strided(1);
        return;
    }
    let path = std::env::temp_dir().join(format!("vgpu-trace-{}.jsonl", std::process::id()));
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_trace_has_one_line_of_json_a_launch"])
        .env("VGPU_TRACE", &path)
        .status()
        .unwrap();
    assert!(child.success());
    let lines = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), 2);
    for part in [
        "{\"kernel\":\"strided\",\"grid\":[1, 1, 1],\"block\":[32, 1, 1],\"cluster\":[1, 1, 1],\"shared_bytes\":4096,",
        "\"global_requests\":2,\"global_sectors\":36,\"sectors_per_request\":18.000,",
        "\"global_bytes_read\":128,\"global_bytes_written\":128,\"shared_wavefronts\":64,\"bank_conflicts\":62,",
        "\"instructions\":{\"integer\":",
    ] {
        assert!(lines[0].contains(part), "{part} in {}", lines[0]);
    }
    assert!(lines[0].ends_with('}') && lines[1].contains("\"bank_conflicts\":0,"), "{}", lines[1]);
}
