//! Fences in programs as text: what no run can show, because memory here is coherent.
//!
//! On every path through a kernel, a barrier object is fenced or a barrier is passed between its `mbarrier.init` and the first use of such
//! an object; and after ordinary stores to shared memory a `fence.proxy.async` comes before a bulk copy reads shared memory. Both look at
//! the text alone: every store and every object counts, whatever its address.

use vgpu::ptx::{Function, Instr, Operand, parse};

/// Two positions with nothing between them on some path.
#[derive(Debug, PartialEq)]
struct Missing {
    what: &'static str,
    kernel: String,
    /// Lines of the first and the second instruction.
    lines: (u32, u32),
}

/// A rule: what starts it, what ends it, and what must not come before that.
struct Rule {
    what: &'static str,
    starts: fn(&str) -> bool,
    ends: fn(&str) -> bool,
    needs: fn(&str) -> bool,
}

fn has(opcode: &str, part: &str) -> bool {
    opcode.split('.').any(|p| p == part)
}

/// A barrier that all threads of the block or the cluster wait at.
fn waits_for_all(opcode: &str) -> bool {
    ["bar.sync", "bar.cta.sync", "bar.red", "barrier.sync", "barrier.cta.sync", "barrier.cluster.wait"]
        .iter()
        .any(|b| opcode.starts_with(b))
}

const RULES: [Rule; 2] = [
    Rule {
        what: "a use of a barrier object after mbarrier.init without a fence or barrier between",
        starts: |o| o.starts_with("mbarrier.init"),
        ends: |o| waits_for_all(o) || o.starts_with("fence.mbarrier_init"),
        needs: |o| {
            let used = o.starts_with("mbarrier.") && !has(o, "init") && !has(o, "inval");
            used || o.starts_with("cp.async.bulk") && o.contains("mbarrier")
        },
    },
    Rule {
        what: "a bulk copy out of shared memory after ordinary stores there without fence.proxy.async between",
        starts: |o| {
            let (store, shared) = (o.starts_with("st.") || o.starts_with("stmatrix"), o.contains(".shared"));
            store && shared && !has(o, "async")
        },
        ends: |o| o.starts_with("fence.proxy.async") && !has(o, "global"),
        needs: |o| {
            let copy = o.starts_with("cp.async.bulk") || o.starts_with("cp.reduce.async.bulk");
            copy && (o.contains(".global.shared") || o.contains(".shared::cluster.shared"))
        },
    },
];

/// Positions that can come after one.
fn after(body: &[Instr], n: usize) -> Vec<usize> {
    let i = &body[n];
    let base = i.opcode.split('.').next().unwrap_or("");
    let target = i.operands.iter().find_map(|o| if let Operand::Label(t) = o { Some(*t) } else { None });
    let jumps = base == "bra";
    let ends = matches!(base, "bra" | "ret" | "exit" | "trap") && i.guard.is_none();
    let next = (!ends).then_some(n + 1);
    next.into_iter().chain(target.filter(|_| jumps)).filter(|n| *n < body.len()).collect()
}

fn missing(f: &Function) -> Vec<Missing> {
    let mut found = Vec::new();
    for rule in &RULES {
        for (start, i) in f.body.iter().enumerate().filter(|(_, i)| (rule.starts)(&i.opcode)) {
            let (mut seen, mut open) = (vec![false; f.body.len()], after(&f.body, start));
            while let Some(n) = open.pop() {
                if std::mem::replace(&mut seen[n], true) {
                    continue;
                }
                let at = &f.body[n];
                // What a guard may skip is counted on only where it starts a rule.
                if (rule.ends)(&at.opcode) && at.guard.is_none() {
                    continue;
                }
                if (rule.needs)(&at.opcode) {
                    let lines = (i.line, at.line);
                    found.push(Missing { what: rule.what, kernel: f.name.clone(), lines });
                    break;
                }
                open.extend(after(&f.body, n));
            }
        }
    }
    found
}

fn of(text: &str) -> Vec<Missing> {
    let module = parse(text).unwrap_or_else(|e| panic!("{e}"));
    module.functions.iter().flat_map(missing).collect()
}

/// A program without the jumps over a fence that its planted mistakes take.
fn without_mistakes(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("//")).collect();
    let jumps_over = |n: usize| {
        let next = lines.get(n + 1).is_some_and(|l| l.starts_with("fence.proxy.async"));
        next && lines[n].starts_with('@') && lines[n].contains("bra")
    };
    (0..lines.len()).filter(|n| !jumps_over(*n)).map(|n| lines[n].to_string() + "\n").collect()
}

#[test]
fn programs_have_their_fences() {
    for (name, text) in [
        ("hopper_triton", include_str!("cuda/hopper_triton.ptx")),
        ("gemm", include_str!("cuda/gemm.ptx")),
        ("attention", include_str!("cuda/attention.ptx")),
    ] {
        assert_eq!(of(text), [], "{name}");
    }
    // A parameter of its product leaves the fence before the store out.
    let hopper = include_str!("cuda/hopper.ptx");
    let found = of(hopper);
    assert!(!found.is_empty() && found.iter().all(|m| m.what == RULES[1].what), "{found:?}");
    assert_eq!(of(&without_mistakes(hopper)), []);
}

/// A kernel of Hopper with a body.
fn kernel(body: &str) -> String {
    format!(
        ".version 8.6\n.target sm_90a\n.address_size 64\n.entry k(.param .u64 p) {{ .reg .b64 %p; .reg .b32 %s, %b, %r; .reg .pred %q;
        .shared .align 16 .b8 sm[64];\n{}\nret; }}",
        body.replace("; ", ";\n")
    )
}

#[test]
fn missing_fences_are_found() {
    let init = "@%q mbarrier.init.shared::cta.b64 [%b], 1;";
    let wait = "W: mbarrier.try_wait.parity.shared::cta.b64 %q, [%b], 0; @!%q bra W;";
    let arrive = "mbarrier.arrive.shared::cta.b64 _, [%b];";
    let store = "st.shared.u32 [%s], %r;";
    let copy = "cp.async.bulk.global.shared::cta.bulk_group [%p], [%s], 16;";
    let load = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%p], 16, [%b];";
    let none = |body: &str| assert_eq!(of(&kernel(body)), [], "{body}");
    let one = |body: &str, lines: (u32, u32)| {
        let found = of(&kernel(body));
        // The body starts in line 6.
        assert_eq!(
            found.iter().map(|m| m.lines).collect::<Vec<_>>(),
            [(lines.0 + 5, lines.1 + 5)],
            "{body}: {found:?}"
        );
    };
    none(&format!("{init} bar.sync 0; {wait}"));
    none(&format!("{init} fence.mbarrier_init.release.cluster; {arrive}"));
    none(&format!("{arrive} {init}"));
    one(&format!("{init} {wait}"), (1, 2));
    one(&format!("{init} bar.arrive 0, 64; {arrive}"), (1, 3));
    one(&format!("{init} {load}"), (1, 2));
    // Only one of two ways passes the barrier, or the barrier is guarded.
    one(&format!("{init} @%q bra ELSE; bar.sync 0; ELSE: {arrive}"), (1, 4));
    one(&format!("{init} @%q bar.sync 0; {arrive}"), (1, 3));
    none(&format!("{store} fence.proxy.async.shared::cta; bar.sync 0; {copy}"));
    none(&format!("{copy} {store}"));
    one(&format!("{store} bar.sync 0; {copy}"), (1, 3));
    one(&format!("{store} fence.proxy.async.global; {copy}"), (1, 3));
    // Around a loop: the store of one round, the copy of the next.
    one(&format!("L: {copy} {store} @%q bra L;"), (2, 1));
}
