//! Matrix instructions lane by lane: every shape of `mma.sync`, `stmatrix`, `movmatrix`. Layouts from the figures of the ISA text.

use vgpu::{Config, Memory, Module};

use super::exact::{BF16, F16, F64, Mode};
use super::harness::builds;

/// Runs `body` on a warp; registers `%w0..` come from `input[lane]`, and `%w0..` of the same number go out.
fn warp(body: &str, input: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let n = input[0].len();
    let loads: String = (0..n).map(|i| format!("ld.global.b32 %w{i}, [%in+{}];", 4 * i)).collect();
    let stores: String = (0..n).map(|i| format!("st.global.b32 [%out+{}], %w{i};", 4 * i)).collect();
    let text = format!(
        ".version 8.8\n.target sm_90\n.address_size 64\n.entry k(.param .u64 in, .param .u64 out) {{ .shared .align 16 .b8 sh[1024];
        .reg .b64 %in, %out, %l<9>; .reg .b32 %w<40>, %t, %s; ld.param.u64 %in, [in]; ld.param.u64 %out, [out]; mov.u32 %t, %tid.x;
        mad.wide.u32 %in, %t, {0}, %in; mad.wide.u32 %out, %t, {0}, %out; {loads} {body} {stores} ret; }}",
        4 * n
    );
    let mut out: Vec<Vec<u32>> = Vec::new();
    for build in builds() {
        let mut m = Memory::new();
        let module = Module::load_for(build, &text, &mut m).unwrap_or_else(|e| panic!("{e}"));
        let bytes: Vec<u8> = input.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
        let (a, b) = (m.alloc(bytes.len()).unwrap(), m.alloc(bytes.len()).unwrap());
        m.write(a, &bytes).unwrap();
        module.launch("k", &Config::default(), &[&a.to_le_bytes(), &b.to_le_bytes()], &m).unwrap();
        let mut got = vec![0; bytes.len()];
        m.read(b, &mut got).unwrap();
        let words: Vec<u32> = got.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect();
        let lanes: Vec<Vec<u32>> = words.chunks(n).map(<[u32]>::to_vec).collect();
        assert!(out.is_empty() || out == lanes, "the builds differ");
        out = lanes;
    }
    out
}

/// Whole numbers from -4 to 4: every product and sum is exact in every format.
fn small(i: usize) -> i32 {
    (i * 7 + i * i * 3 + i / 5) as i32 % 9 - 4
}

fn element(ty: &str, x: i32) -> u64 {
    let bits = f64::from(x).to_bits();
    match ty {
        "f16" => F16.write(&F64.read(bits), Mode::Nearest).unwrap(),
        "bf16" => BF16.write(&F64.read(bits), Mode::Nearest).unwrap(),
        "f32" | "tf32" => u64::from((x as f32).to_bits()),
        "f64" => bits,
        "s32" => u64::from(x as u32),
        _ => u64::from(x as u8),
    }
}

fn bits(ty: &str) -> usize {
    match ty {
        "u8" | "s8" => 8,
        "f16" | "bf16" => 16,
        "f64" => 64,
        _ => 32,
    }
}

/// Row and column in A of element `i` of a lane: `per` elements of a register lie side by side; registers go down the rows by
/// eight, then right.
fn place_a(m: usize, per: usize, lane: usize, i: usize) -> (usize, usize) {
    let (group, t, register, within) = (lane / 4, lane % 4, i / per, i % per);
    let tall = m / 8;
    (group + 8 * (register % tall), t * per + within + 4 * per * (register / tall))
}

fn check(shape: (usize, usize, usize), types: [&str; 4], extra: &str) {
    let (m, n, k) = shape;
    let [d, ta, tb, tc] = types;
    let signed = |ty: &str, x: i32| if ty == "u8" { x.abs() * 31 } else { x };
    let a = |r: usize, c: usize| signed(ta, small(r * k + c));
    let b = |r: usize, c: usize| signed(tb, small(100 + r * n + c));
    let c = |r: usize, col: usize| small(500 + r * n + col);
    let pack = |ty: &str, list: &[i32]| -> Vec<u32> {
        let width = bits(ty);
        let mut words = vec![0u32; (list.len() * width).div_ceil(32)];
        for (i, x) in list.iter().enumerate() {
            let v = element(ty, *x);
            if width == 64 {
                (words[2 * i], words[2 * i + 1]) = (v as u32, (v >> 32) as u32);
            } else {
                words[i * width / 32] |= (v as u32) << (i * width % 32);
            }
        }
        words
    };
    let per = |ty: &str| (32 / bits(ty)).max(1);
    let (na, nb, nc) = (m * k / 32, n * k / 32, m * n / 32);
    // C and D: two neighbours of a row in each lane, rows eight apart.
    let place_c = |lane: usize, i: usize| (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
    let input: Vec<Vec<u32>> = (0..32)
        .map(|lane| {
            let la: Vec<i32> = (0..na)
                .map(|i| {
                    let (r, c) = place_a(m, per(ta), lane, i);
                    a(r, c)
                })
                .collect();
            // B is A's layout with rows and columns exchanged, eight columns wide.
            let lb: Vec<i32> = (0..nb)
                .map(|i| {
                    let (c, r) = place_a(8, per(tb), lane, i);
                    b(r, c)
                })
                .collect();
            let lc: Vec<i32> = (0..nc)
                .map(|i| {
                    let (r, col) = place_c(lane, i);
                    c(r, col)
                })
                .collect();
            [pack(ta, &la), pack(tb, &lb), pack(tc, &lc)].concat()
        })
        .collect();
    let words = |ty: &str, n: usize| (n * bits(ty)).div_ceil(32);
    let (wa, wb, wc) = (words(ta, na), words(tb, nb), words(tc, nc));
    let list = |from: usize, n: usize, ty: &str| -> String {
        let r: Vec<String> = if ty == "f64" {
            (from / 2..from / 2 + n / 2).map(|i| format!("%l{i}")).collect()
        } else {
            (from..from + n).map(|i| format!("%w{i}")).collect()
        };
        format!("{{{}}}", r.join(", "))
    };
    let mut body = String::new();
    if ta == "f64" {
        for i in 0..(wa + wb + wc) / 2 {
            body += &format!("mov.b64 %l{i}, {{%w{}, %w{}}};", 2 * i, 2 * i + 1);
        }
    }
    let at_c = wa + wb;
    body += &format!(
        "mma.sync.aligned.m{m}n{n}k{k}.row.col{extra}.{d}.{ta}.{tb}.{tc} {}, {}, {}, {};",
        list(at_c, wc, tc),
        list(0, wa, ta),
        list(wa, wb, tb),
        list(at_c, wc, tc)
    );
    if ta == "f64" {
        for i in at_c / 2..(at_c + wc) / 2 {
            body += &format!("mov.b64 {{%w{}, %w{}}}, %l{i};", 2 * i, 2 * i + 1);
        }
    }
    for (lane, got) in warp(&body, &input).into_iter().enumerate() {
        let want: Vec<i32> = (0..nc)
            .map(|i| {
                let (r, col) = place_c(lane, i);
                c(r, col) + (0..k).map(|j| a(r, j) * b(j, col)).sum::<i32>()
            })
            .collect();
        assert_eq!(got[at_c..], pack(d, &want), "m{m}n{n}k{k} {types:?}, lane {lane}: {want:?}");
    }
}

#[test]
fn every_shape_of_mma_lane_by_lane() {
    for k in [8, 16] {
        check((16, 8, k), ["f32", "f16", "f16", "f32"], "");
        check((16, 8, k), ["f16", "f16", "f16", "f16"], "");
        check((16, 8, k), ["f32", "bf16", "bf16", "f32"], "");
    }
    for k in [4, 8] {
        check((16, 8, k), ["f32", "tf32", "tf32", "f32"], "");
    }
    for (m, k) in [(8, 16), (16, 16), (16, 32)] {
        for a in ["u8", "s8"] {
            for b in ["u8", "s8"] {
                check((m, 8, k), ["s32", a, b, "s32"], "");
                check((m, 8, k), ["s32", a, b, "s32"], ".satfinite");
            }
        }
    }
    check((8, 8, 4), ["f64", "f64", "f64", "f64"], "");
}

#[test]
fn byte_products_wrap_around_or_saturate() {
    // All A and B 127 and C the largest number: the sum of 16 products of 127 * 127 goes over it.
    let input =
        vec![vec![0x7f7f_7f7f, 0x7f7f_7f7f, 0x7f7f_7f7f, 0x7fff_ffff, 0x7fff_ffff, 0x7fff_ffff, 0x7fff_ffff]; 32];
    for (extra, want) in [("", 0x7fff_ffffu32.wrapping_add(16 * 127 * 127)), (".satfinite", 0x7fff_ffff)] {
        let body = format!(
            "mma.sync.aligned.m16n8k16.row.col{extra}.s32.s8.s8.s32 {{%w3, %w4, %w5, %w6}}, {{%w0, %w1}}, {{%w2}}, {{%w3, %w4, %w5, %w6}};"
        );
        for got in warp(&body, &input) {
            assert_eq!(got[3..], [want; 4]);
        }
    }
}

#[test]
fn stmatrix_puts_rows_where_the_addresses_say() {
    for n in [1usize, 2, 4] {
        for trans in ["", ".trans"] {
            let input: Vec<Vec<u32>> = (0..32u32)
                .map(|l| (0..4).map(|i| ((2 * l + 1) << 16) | (2 * l) | (i << 28) | (i << 12)).collect())
                .collect();
            let regs: Vec<String> = (0..n).map(|i| format!("%w{i}")).collect();
            // Lane l gives row l; afterwards each lane reads its 16 bytes back.
            let body = format!(
                "mov.u32 %s, sh; shl.b32 %w10, %t, 4; add.u32 %s, %s, %w10; mov.u32 %w11, 0;
                st.shared.v4.u32 [%s], {{%w11, %w11, %w11, %w11}}; bar.sync 0;
                stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%s], {{{}}}; bar.sync 0; ld.shared.v4.u32 {{%w0, %w1, %w2, %w3}}, [%s];",
                regs.join(", ")
            );
            for (l, got) in warp(&body, &input).into_iter().enumerate() {
                let (matrix, row) = (l / 8, l % 8);
                for col in 0..8 {
                    let (r, c) = if trans.is_empty() { (row, col) } else { (col, row) };
                    // Element (r, c) of a fragment is half c % 2 of lane 4 r + c / 2.
                    let held = (2 * (4 * r + c / 2) + c % 2) as u32 | (matrix as u32) << 12;
                    let want = if matrix < n { held } else { 0 };
                    assert_eq!(got[col / 2] >> (16 * (col % 2)) & 0xffff, want, "x{n}{trans}, row {l}, column {col}");
                }
            }
        }
    }
}

#[test]
fn movmatrix_transposes() {
    let input: Vec<Vec<u32>> = (0..32u32).map(|l| vec![((2 * l + 1) << 16) | (2 * l)]).collect();
    for (l, got) in warp("movmatrix.sync.aligned.m8n8.trans.b16 %w0, %w0;", &input).into_iter().enumerate() {
        for half in 0..2 {
            let (row, col) = (l / 4, 2 * (l % 4) + half);
            assert_eq!(got[0] >> (16 * half) & 0xffff, (col * 8 + row) as u32, "lane {l}");
        }
    }
}
