//! A kernel around a few lines of PTX, for the tests of the Hopper set.

use vgpu::{Config, Error, Fault, FaultKind, Memory, Module};

/// Bytes of `sm`.
pub const SPACE: usize = 65536;

/// A kernel with the body's instructions. At hand: `%t` the thread, `%s` and `%b` the shared offsets of `sm` (1024-byte
/// aligned) and of eight barriers, `%in` and `%out` global addresses, `%map` the address of a tensor map, `%q0` true in
/// thread 0, `%rank` the rank in the cluster; free: `%r`, `%f`, `%h`, `%p`, `%q1..`.
pub fn text(body: &str) -> String {
    // Names in capitals stand for instructions that many tests need.
    let body = body
        .replace("INIT", "@%q0 mbarrier.init.shared::cta.b64 [%b], 1; fence.mbarrier_init.release.cluster; bar.sync 0;")
        .replace("EXPECT", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b],")
        .replace("WAIT", "W: mbarrier.try_wait.parity.shared::cta.b64 %q1, [%b], 0; @!%q1 bra W;")
        .replace("CLUSTER", "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;");
    format!(
        ".version 8.6\n.target sm_90a\n.address_size 64
        .entry k(.param .align 64 .b8 map[128], .param .u64 in, .param .u64 out) .maxntid 512 {{
        .reg .b64 %in, %out, %map, %p<12>; .reg .b32 %t, %s, %b, %rank, %r<16>; .reg .b16 %h<4>; .reg .f32 %f<4>;
        .reg .pred %q<6>;
        .shared .align 1024 .b8 sm[{SPACE}]; .shared .align 8 .b8 bar[64];
        mov.u32 %t, %tid.x; mov.u32 %s, sm; mov.u32 %b, bar; setp.eq.u32 %q0, %t, 0; mov.u32 %rank, %cluster_ctarank;
        ld.param.u64 %in, [in]; ld.param.u64 %out, [out]; mov.b64 %p0, map; cvta.param.u64 %map, %p0;
        {body}
        ret; }}"
    )
}

/// What a launch needs beside its body.
pub struct Run {
    pub block: u32,
    pub blocks: u32,
    pub cluster: u32,
    pub seed: Option<u64>,
}

/// One block of 32 threads.
pub const ONE: Run = Run { block: 32, blocks: 1, cluster: 1, seed: None };

impl Run {
    /// Launches the kernel of a module on global addresses and a map.
    pub fn launch(&self, module: &Module, m: &Memory, map: &[u8; 128], input: u64, out: u64) -> Result<(), Error> {
        let shape = Config {
            grid: [self.blocks, 1, 1],
            block: [self.block, 1, 1],
            cluster: [self.cluster, 1, 1],
            seed: self.seed,
            budget: 10_000_000,
            ..Config::default()
        };
        module.launch("k", &shape, &[map, &input.to_le_bytes(), &out.to_le_bytes()], m).map(|_| ())
    }

    /// Runs a body on words; `out` starts as `words` zeros.
    pub fn words(&self, body: &str, input: &[u32], words: usize) -> Result<Vec<u32>, Error> {
        let mut m = Memory::new();
        let module = Module::load(&text(body), &mut m).unwrap_or_else(|e| panic!("{body}: {e}"));
        let (from, to) = (m.alloc(input.len().max(4) * 4).unwrap(), m.alloc(words * 4).unwrap());
        m.write(from, &input.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()).unwrap();
        m.fill(to, 0, words * 4).unwrap();
        self.launch(&module, &m, &[0; 128], from, to)?;
        let mut bytes = vec![0; words * 4];
        m.read(to, &mut bytes).unwrap();
        Ok(bytes.as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c)).collect())
    }

    /// The fault of a body; it must have this kind and this text.
    #[track_caller]
    pub fn finds(&self, body: &str, kind: FaultKind, part: &str) -> Fault {
        match self.words(body, &[7; 4096], 64) {
            Err(Error::Fault(f)) if f.kind == kind && f.message.contains(part) => *f,
            Err(e) => panic!("{body}: {e}"),
            Ok(_) => panic!("{body}: nothing found"),
        }
    }
}
