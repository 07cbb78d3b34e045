//! Operands of the sm_90a opcodes.

use super::descriptor::Major;
use super::product::{Element, Sum};
use super::{Op, Product, Source};
use crate::exec::alu::Op as Opcode;
use crate::exec::decode::{Decoded, Decoder};
use crate::exec::mem::Space;
use crate::exec::opcode::{need, unknown};
use crate::exec::{Act, Class, File, Inst, NONE};
use crate::ptx::{Operand, Ty};

pub(super) fn one_of<T: Copy>(op: &mut Opcode<'_>, names: &[(&str, T)]) -> Option<T> {
    names.iter().find(|(n, _)| op.take(n)).map(|(_, v)| *v)
}

pub(super) fn number(o: Option<&Operand>) -> Decoded<u64> {
    match o {
        Some(Operand::Int(n)) => Ok(*n),
        _ => Err("expected a number".into()),
    }
}

/// Order and scope, which change nothing here: memory is coherent and in program order.
pub(super) fn order(op: &mut Opcode<'_>) {
    op.mods.retain(|m| !matches!(*m, "acquire" | "release" | "relaxed" | "acq_rel" | "cta" | "cluster"));
}

/// State space of a barrier or a shared operand; whether it may be in another block.
pub(super) fn shared(op: &mut Opcode<'_>) -> Space {
    if op.take("shared::cluster") {
        Space::Cluster
    } else if op.take("shared::cta") || op.take("shared") {
        Space::Shared
    } else {
        Space::Generic
    }
}

impl Decoder<'_> {
    /// The instruction, if its opcode is one of this set.
    pub(in crate::exec) fn hopper(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Option<Decoded<Inst>> {
        let has = |m: &str| op.mods.contains(&m);
        // Barrier objects are older than the rest.
        let newer = match op.base {
            "wgmma" | "elect" | "setmaxnreg" | "griddepcontrol" | "mapa" | "getctarank" => true,
            "mbarrier" => has("try_wait") || has("expect_tx") || has("complete_tx"),
            "cp" => has("bulk"),
            "barrier" => has("cluster"),
            "st" | "red" => has("async"),
            _ => false,
        };
        if newer && self.sm() < 90 {
            return Some(Err(format!("{} needs .target sm_90, the module says sm_{}", op.base, self.sm())));
        }
        Some(match op.base {
            "wgmma" => self.wgmma(op, o),
            "mbarrier" => self.mbarrier(op, o),
            "cp" if has("bulk") => self.bulk(op, o),
            "cp" if has("mbarrier") => self.copy_arrive(op, o),
            "fence" | "membar" if has("proxy") || has("mbarrier_init") || has("sync_restrict::shared::cluster") => {
                self.proxy_fence(op, o)
            }
            "prefetch" if has("tensormap") => {
                op.mods.retain(|m| !matches!(*m, "tensormap" | "param" | "const"));
                Ok(Self::blank(Act::Nop, Class::Memory))
            }
            "elect" => self.elect(op, o),
            "setmaxnreg" => self.setmaxnreg(op, o),
            "griddepcontrol" => {
                if !op.take("wait") && !op.take("launch_dependents") {
                    return Some(unknown(op));
                }
                Ok(Self::blank(Act::Nop, Class::Control))
            }
            "barrier" if has("cluster") => self.cluster_barrier(op, o),
            "mapa" => self.mapa(op, o),
            "getctarank" => self.rank_of(op, o),
            "st" | "red" if has("async") => self.store_async(op, o),
            _ => return None,
        })
    }

    /// `mov.pred` from `%is_explicit_cluster`: whether that number is not zero.
    pub(in crate::exec) fn explicit_cluster(&mut self, d: &Operand) -> Decoded<Inst> {
        let mut i = Self::blank(Act::Alu(super::IS_CLUSTER.pick(self.build)), Class::Integer);
        i.d = self.dst(d, Ty::Pred)?;
        i.a = self.special("%is_explicit_cluster")?;
        Ok(i)
    }

    pub(super) fn own(op: Op, class: Class) -> Inst {
        Self::blank(Act::Hopper(Box::new(op)), class)
    }

    fn wgmma(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        if !op.take("sync") || !op.take("aligned") {
            return unknown(op);
        }
        if op.take("fence") {
            need(o, 0)?;
            return Ok(Self::own(Op::Fence, Class::Tensor));
        }
        if op.take("commit_group") {
            need(o, 0)?;
            return Ok(Self::own(Op::Commit, Class::Tensor));
        }
        if op.take("wait_group") {
            need(o, 1)?;
            return Ok(Self::own(Op::Wait(number(o.first())? as u32), Class::Tensor));
        }
        if !op.take("mma_async") {
            return unknown(op);
        }
        let shape = op.mods.iter().position(|m| m.starts_with("m64n"));
        let Some((n, k)) = shape.and_then(|i| op.mods.remove(i)[4..].split_once('k')) else {
            return unknown(op);
        };
        let (Ok(n), Ok(k)) = (n.parse::<usize>(), k.parse::<usize>()) else {
            return unknown(op);
        };
        let saturate = op.take("satfinite");
        let types = std::mem::take(&mut op.mods);
        let [d, a, b] = types[..] else {
            op.mods = types;
            return unknown(op);
        };
        let element = |name: &str| {
            Some(match name {
                "f16" => Element::F16,
                "bf16" => Element::Bf16,
                "tf32" => Element::Tf32,
                "e4m3" => Element::E4m3,
                "e5m2" => Element::E5m2,
                "s8" => Element::S8,
                "u8" => Element::U8,
                _ => return None,
            })
        };
        let (Some(ea), Some(eb)) = (element(a), element(b)) else {
            op.mods = vec![a, b];
            return unknown(op);
        };
        use Element::*;
        let (bytes, float8) = (matches!(ea, S8 | U8), matches!(ea, E4m3 | E5m2));
        let sum = match (d, ea) {
            ("f32", F16 | Bf16 | Tf32 | E4m3 | E5m2) => Sum::F32,
            ("f16", F16 | E4m3 | E5m2) => Sum::F16,
            ("s32", S8 | U8) => Sum::S32 { saturate },
            _ => return Err(format!("accumulators of type {d} for {a}")),
        };
        let pair = ea == eb || float8 && matches!(eb, E4m3 | E5m2) || bytes && matches!(eb, S8 | U8);
        let wide = n.is_multiple_of(8) && (8..=256).contains(&n);
        // Byte products exist for fewer widths.
        let listed = !bytes || n <= 32 || n.is_multiple_of(16) && n <= 224;
        if !pair || k != ea.k() || !wide || !listed || saturate && !bytes {
            return Err(format!("no product m64n{n}k{k} of {a} and {b}"));
        }
        let per = if sum == Sum::F16 { n / 4 } else { n / 2 };
        let d = self.words_of(o, per)?;
        let from_registers = matches!(o.get(1), Some(Operand::Vector(_)));
        let transposes = match (ea.size() == 2, from_registers) {
            (true, false) => 2,
            (true, true) => 1,
            (false, _) => 0,
        };
        let scales = if bytes { 0 } else { 2 };
        need(o, 4 + scales + transposes)?;
        let a = if from_registers {
            let rows = self.words_of(&o[1..2], 4)?;
            Source::Registers([rows[0], rows[1], rows[2], rows[3]])
        } else {
            Source::Shared(self.src(&o[1], Ty::B64)?)
        };
        let b_row = self.src(&o[2], Ty::B64)?;
        let scale_d = self.predicate(&o[3])?;
        let mut negate = false;
        for s in &o[4..4 + scales] {
            match number(Some(s))? as i64 {
                1 => {}
                -1 => negate = !negate,
                other => return Err(format!("scale {other} is neither 1 nor -1")),
            }
        }
        let mut majors = [Major::K; 2];
        for (i, t) in o[4 + scales..].iter().enumerate() {
            majors[i + 2 - transposes.max(1)] = match number(Some(t))? {
                0 => Major::K,
                1 => Major::Mn,
                other => return Err(format!("transposition {other} is neither 0 nor 1")),
            };
        }
        let product = Product {
            a: ea,
            b: eb,
            sum,
            n,
            d,
            from: a,
            descriptor: b_row,
            scale_d,
            negate,
            major_a: majors[0],
            major_b: majors[1],
            tracked_d: Vec::new(),
            tracked_a: Vec::new(),
        };
        Ok(Self::own(Op::Product(product), Class::Tensor))
    }

    fn words_of(&mut self, o: &[Operand], n: usize) -> Decoded<Vec<u16>> {
        let list = match o.first() {
            Some(v @ Operand::Vector(_)) => self.list(v, Ty::B32)?,
            _ => return Err(format!("expected a vector of {n} registers")),
        };
        if list.len() != n || list.iter().any(|(f, row)| *f != File::W || *row == NONE) {
            return Err(format!("expected {n} 32-bit registers, found {}", list.len()));
        }
        Ok(list.into_iter().map(|(_, row)| row).collect())
    }

    fn proxy_fence(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        let restricted = op.mods.iter().any(|m| m.starts_with("sync_restrict::"));
        op.mods.retain(|m| !m.starts_with("sync_restrict::"));
        if op.take("mbarrier_init") {
            need(o, 0)?;
            if !op.take("release") || !op.take("cluster") {
                return unknown(op);
            }
            return Ok(Self::blank(Act::Nop, Class::Barrier));
        }
        if op.take("proxy") {
            if op.take("alias") {
                return Ok(Self::blank(Act::Nop, Class::Barrier));
            }
            if op.take("tensormap::generic") {
                if op.take("acquire") {
                    need(o, 2)?;
                    if number(o.get(1))? != 128 {
                        return Err("the size of a tensor map is 128".into());
                    }
                    self.address(&o[0], Space::Generic)?;
                } else if !op.take("release") {
                    return unknown(op);
                }
                op.mods.retain(|m| !matches!(*m, "cta" | "cluster" | "gpu" | "sys"));
                return Ok(Self::blank(Act::Nop, Class::Barrier));
            }
            if op.take("async::generic") {
                if !restricted {
                    return unknown(op);
                }
                order(op);
                return Ok(Self::own(Op::ProxyFence, Class::Barrier));
            }
            if op.take("async") {
                need(o, 0)?;
                // A fence for global memory alone does not order shared memory.
                let global = op.take("global");
                shared(op);
                let what = if global { Act::Nop } else { Act::Hopper(Box::new(Op::ProxyFence)) };
                return Ok(Self::blank(what, Class::Barrier));
            }
            return unknown(op);
        }
        order(op);
        Ok(Self::blank(Act::Nop, Class::Barrier))
    }

    fn elect(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        if !op.take("sync") {
            return unknown(op);
        }
        let mut i = Self::blank(Act::Warp(super::ELECT.pick(self.build)), Class::Warp);
        let (d, p) = self.dst_pair(&o[0], Ty::B32, Ty::Pred)?;
        (i.d, i.x, i.y) = (d, u32::from(p), u32::from(self.src(&o[1], Ty::U32)?));
        Ok(i)
    }

    fn setmaxnreg(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 1)?;
        let Some(grow) = one_of(op, &[("inc", true), ("dec", false)]) else {
            return unknown(op);
        };
        if !["sync", "aligned", "u32"].iter().all(|m| op.take(m)) {
            return unknown(op);
        }
        let count = number(o.first())?;
        if !(24..=256).contains(&count) || !count.is_multiple_of(8) {
            return Err(format!("{count} registers: a multiple of 8 from 24 to 256 is needed"));
        }
        let count = count as u32;
        Ok(Self::own(Op::Registers { grow, count }, Class::Control))
    }

    fn cluster_barrier(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 0)?;
        op.take("cluster");
        let aligned = op.take("aligned");
        let Some(what) = one_of(op, &[("arrive", 0), ("wait", 1)]) else {
            return unknown(op);
        };
        let orders: &[&str] = if what == 0 { &["release", "relaxed"] } else { &["acquire"] };
        op.mods.retain(|m| !orders.contains(m));
        let what = if what == 0 { Op::ClusterArrive { aligned } } else { Op::ClusterWait { aligned } };
        Ok(Self::own(what, Class::Barrier))
    }

    fn mapa(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 3)?;
        let ty = op.ty().ok_or("no type")?;
        let cluster = op.take("shared::cluster");
        if !matches!(ty, Ty::U32 | Ty::U64) || !cluster && ty != Ty::U64 {
            return unknown(op);
        }
        let f = match (ty, cluster) {
            (Ty::U32, _) => super::MAPA_WORD,
            (_, true) => super::MAPA_LONG,
            _ => super::MAPA_GENERIC,
        };
        let mut i = Self::blank(Act::Alu(f.pick(self.build)), Class::Integer);
        (i.d, i.a, i.b) = (self.dst(&o[0], ty)?, self.src(&o[1], ty)?, self.src(&o[2], Ty::U32)?);
        Ok(i)
    }

    fn rank_of(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        let ty = op.ty().ok_or("no type")?;
        op.take("shared::cluster");
        let f = match ty {
            Ty::U32 => super::RANK_WORD,
            Ty::U64 => super::RANK_LONG,
            _ => return unknown(op),
        };
        let mut i = Self::blank(Act::Alu(f.pick(self.build)), Class::Integer);
        (i.d, i.a) = (self.dst(&o[0], Ty::B32)?, self.src(&o[1], ty)?);
        i.b = self.special("%cluster_ctarank")?;
        Ok(i)
    }
}
