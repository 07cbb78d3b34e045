//! The AMX instructions that ringtune uses, on processors without them: a handler of the signal of an unknown instruction decodes the
//! bytes at its address, carries it out as the manual says, and goes on behind it. Tiles are a thread's own.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (LDTILECFG, TILEZERO, TILELOADD, TILESTORED,
//! TDPBF16PS, TILERELEASE) and volume 2, 2.3 (the VEX prefix).

use std::cell::UnsafeCell;
use std::sync::Once;

const ROWS: usize = 16;
const LANES: usize = 16;

/// Rows of 64 bytes as units of four.
type Tile = [[u32; LANES]; ROWS];

/// A thread's tiles.
struct State {
    /// Rows and bytes of a row of each tile; none before a configuration and after a release.
    shapes: [(usize, usize); 8],
    tiles: [Tile; 8],
}

thread_local! {
    // Without a destructor and without an initialiser that runs: a signal handler may touch it.
    static STATE: UnsafeCell<State> = const { UnsafeCell::new(State { shapes: [(0, 0); 8], tiles: [[[0; LANES]; ROWS]; 8] }) };
}

/// Emulates AMX in this process from now on. The first call counts.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a handler of the right form, which touches only its arguments, this thread's tiles and what the instruction names.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0, "a handler of SIGILL");
        }
    });
}

extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO the context that the thread goes on from.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let mut cpu = Cpu { registers: &mut context.uc_mcontext.gregs };
    let done = STATE.with(|state| {
        // SAFETY: this thread alone has the state, and no instruction inside the handler is emulated.
        let state = unsafe { &mut *state.get() };
        cpu.step(state)
    });
    if done.is_none() {
        // Not one of ours: the next attempt ends the process as it would have.
        // SAFETY: the default action of a signal.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
    }
}

/// The interrupted thread's registers.
struct Cpu<'a> {
    registers: &'a mut [libc::greg_t; 23],
}

/// Where an operand stands in memory.
struct Memory {
    start: usize,
    /// The index of the address, scaled: the distance between rows.
    stride: usize,
}

impl Cpu<'_> {
    fn register(&self, number: u8) -> usize {
        const ORDER: [libc::c_int; 16] = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        self.registers[ORDER[usize::from(number)] as usize] as usize
    }

    /// Carries out the instruction at the instruction pointer; `None` if it is not one of AMX.
    fn step(&mut self, state: &mut State) -> Option<()> {
        let at = self.registers[libc::REG_RIP as usize] as usize;
        // SAFETY: the processor has just fetched an instruction from here; those of AMX have at least five bytes.
        let byte = |i: usize| unsafe { *((at + i) as *const u8) };
        // VEX of three bytes: C4, then R X B (inverted) and the map, then W, vvvv (inverted), L and pp.
        if byte(0) != 0xc4 {
            return None;
        }
        let (one, two, opcode, modrm) = (byte(1), byte(2), byte(3), byte(4));
        let (r, x, b, map) = (!one >> 7 & 1, !one >> 6 & 1, !one >> 5 & 1, one & 0x1f);
        let (w, vvvv, l, pp) = (two >> 7, !two >> 3 & 0xf, two >> 2 & 1, two & 3);
        if map != 2 || w != 0 || l != 0 {
            return None;
        }
        let (mode, reg, rm) = (modrm >> 6, usize::from(modrm >> 3 & 7 | r << 3), modrm & 7);
        let in_registers = mode == 3;
        let (memory, length) = if in_registers { (None, 5) } else { self.address(at, x, b) };
        match (opcode, pp, memory) {
            // LDTILECFG m512
            (0x49, 0, Some(m)) => state.configure(m.start)?,
            // TILERELEASE
            (0x49, 0, None) => state.shapes = [(0, 0); 8],
            // TILEZERO tmm
            (0x49, 3, None) => state.tiles[reg] = [[0; LANES]; ROWS],
            // TILELOADD tmm, m
            (0x4b, 3, Some(m)) => state.load(reg, &m),
            // TILESTORED m, tmm
            (0x4b, 2, Some(m)) => state.store(reg, &m),
            // TDPBF16PS tmm (reg), tmm (rm), tmm (vvvv)
            (0x5c, 2, None) => state.multiply(reg, usize::from(rm), usize::from(vvvv)),
            _ => return None,
        }
        self.registers[libc::REG_RIP as usize] = (at + length) as libc::greg_t;
        Some(())
    }

    /// The address that the bytes from ModRM on name, and the length of the instruction.
    fn address(&self, at: usize, x: u8, b: u8) -> (Option<Memory>, usize) {
        // SAFETY: the processor has fetched the whole instruction.
        let byte = |i: usize| unsafe { *((at + i) as *const u8) };
        let wide = |i: usize| i32::from_le_bytes([byte(i), byte(i + 1), byte(i + 2), byte(i + 3)]) as isize as usize;
        let (mode, rm) = (byte(4) >> 6, byte(4) & 7);
        let (mut next, mut stride) = (5, 0);
        let mut base = Some(rm | b << 3);
        if rm == 4 {
            let sib = byte(5);
            next = 6;
            let index = sib >> 3 & 7 | x << 3;
            if index != 4 {
                stride = self.register(index) << (sib >> 6);
            }
            base = Some(sib & 7 | b << 3).filter(|_| !(mode == 0 && sib & 7 == 5));
        } else if mode == 0 && rm == 5 {
            // Relative to the next instruction.
            let memory = Memory { start: (at + 9).wrapping_add(wide(5)), stride: 0 };
            return (Some(memory), 9);
        }
        let (offset, length) = match (mode, base) {
            (1, _) => (byte(next) as i8 as isize as usize, next + 1),
            (2, _) | (0, None) => (wide(next), next + 4),
            _ => (0, next),
        };
        let start = base.map_or(0, |r| self.register(r)).wrapping_add(offset);
        (Some(Memory { start, stride }), length)
    }
}

impl Memory {
    fn row(&self, row: usize) -> usize {
        self.start.wrapping_add(row.wrapping_mul(self.stride))
    }
}

impl State {
    /// `None` for what faults: another palette, or a tile larger than a register.
    fn configure(&mut self, at: usize) -> Option<()> {
        // SAFETY: the instruction reads 64 bytes here.
        let config = unsafe { std::ptr::read_unaligned(at as *const [u8; 64]) };
        if config[0] != 1 || config[1] != 0 {
            return None;
        }
        for i in 0..8 {
            let bytes = usize::from(u16::from_le_bytes([config[16 + 2 * i], config[17 + 2 * i]]));
            let rows = usize::from(config[48 + i]);
            if rows > ROWS || bytes > 4 * LANES {
                return None;
            }
            self.shapes[i] = (rows, bytes);
        }
        self.tiles = [[[0; LANES]; ROWS]; 8];
        Some(())
    }

    fn load(&mut self, tile: usize, from: &Memory) {
        let (rows, bytes) = self.shapes[tile];
        assert!(rows > 0, "a tile that is not configured");
        self.tiles[tile] = [[0; LANES]; ROWS];
        for (r, row) in self.tiles[tile].iter_mut().enumerate().take(rows) {
            // SAFETY: the instruction reads these bytes.
            unsafe { std::ptr::copy_nonoverlapping(from.row(r) as *const u8, row.as_mut_ptr().cast::<u8>(), bytes) };
        }
    }

    fn store(&self, tile: usize, to: &Memory) {
        let (rows, bytes) = self.shapes[tile];
        assert!(rows > 0, "a tile that is not configured");
        for (r, row) in self.tiles[tile].iter().enumerate().take(rows) {
            // SAFETY: the instruction writes these bytes.
            unsafe { std::ptr::copy_nonoverlapping(row.as_ptr().cast::<u8>(), to.row(r) as *mut u8, bytes) };
        }
    }

    fn multiply(&mut self, c: usize, a: usize, b: usize) {
        let ((rows, _), (_, steps), (_, columns)) = (self.shapes[c], self.shapes[a], self.shapes[b]);
        let (at, bt) = (self.tiles[a], self.tiles[b]);
        for (sums, a) in self.tiles[c].iter_mut().zip(&at).take(rows) {
            // SAFETY: tiles are emulated only beside AVX-512, which includes fused multiply-add.
            unsafe { multiply_row(sums, &a[..steps / 4], &bt, columns / 4) };
        }
    }
}

/// One row of TDPBF16PS: even and odd steps apart, each step one fused multiply-add, then their sum, then that on the old value.
/// Numbers too small to be normal are zero, before and after each operation; ties go to even.
#[target_feature(enable = "avx2,fma")]
pub fn multiply_row(sums: &mut [u32; LANES], a: &[u32], b: &[[u32; LANES]; ROWS], columns: usize) {
    let (mut even, mut odd) = ([0.0f32; LANES], [0.0f32; LANES]);
    for (&x, row) in a.iter().zip(b) {
        let (x_even, x_odd) = (normal(f32::from_bits(x << 16)), normal(f32::from_bits(x & 0xffff_0000)));
        for n in 0..LANES {
            let (y_even, y_odd) = (normal(f32::from_bits(row[n] << 16)), normal(f32::from_bits(row[n] & 0xffff_0000)));
            even[n] = normal(x_even.mul_add(y_even, even[n]));
            odd[n] = normal(x_odd.mul_add(y_odd, odd[n]));
        }
    }
    for n in 0..columns {
        let old = normal(f32::from_bits(sums[n]));
        sums[n] = normal(old + normal(even[n] + odd[n])).to_bits();
    }
}

#[inline(always)]
fn normal(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}
