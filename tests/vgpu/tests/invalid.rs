//! Statements that the assembler refuses, and neighbours of theirs that it takes: `Module::load` agrees with it on each.
//!
//! Both lists were given to ptxas 12.9.86 (`ptxas -arch=sm_80`), one statement a module as below, and it decided every line so.

use std::fmt::Write;

use vgpu::{Memory, Module};

/// Line of the module that the statement stands on.
const LINE: usize = 9;

/// Statements that are refused, under what is wrong with them.
const REFUSED: &str = r#"
# Types that an instruction does not have.
and.s32 %r1, %r2, %r3;
or.u32 %r1, %r2, %r3;
xor.f32 %f1, %f2, %f3;
not.u32 %r1, %r2;
shl.u32 %r1, %r2, 3;
shr.f32 %f1, %f2, 1;
selp.s8 %h1, %h2, %h3, %p1;
selp.pred %p1, %p2, %p3, %p1;
add.u8 %h1, %h2, %h3;
add.b32 %r1, %r2, %r3;
abs.u32 %r1, %r2;
neg.u32 %r1, %r2;
popc.u32 %r1, %r2;
clz.s32 %r1, %r2;
brev.u32 %r1, %r2;
bfi.u32 %r1, %r2, %r3, 1, 2;
bfe.b32 %r1, %r2, 1, 2;
mul24.lo.u64 %d1, %d2, %d3;
dp4a.u64.u32 %r1, %r2, %r3, %r4;
rem.f32 %f1, %f2, %f3;
copysign.f16 %h1, %h2, %h3;
slct.u32.u32 %r1, %r2, %r3, %r4;
setp.lt.b32 %p1, %r2, %r3;
setp.lo.s32 %p1, %r2, %r3;
setp.equ.u32 %p1, %r2, %r3;
mul.wide.s64 %d1, %d2, %d3;
mul.wide.f32 %d1, %f2, %f3;
atom.global.add.s64 %d1, [%d2], %d3;
atom.global.min.f32 %f1, [%d2], %f3;
atom.global.exch.u32 %r1, [%d2], %r3;
atom.global.cas.u32 %r1, [%d2], %r3, %r4;
atom.global.inc.s32 %r1, [%d2], %r3;
atom.global.and.u32 %r1, [%d2], %r3;
red.global.max.f64 [%d2], %e3;
redux.sync.add.f32 %f1, %f2, 0xffffffff;
redux.sync.and.s32 %r1, %r2, 0xffffffff;
shfl.sync.idx.u32 %r1, %r2, 0, 31, 0xffffffff;
shfl.sync.idx.b64 %d1, %d2, 0, 31, 0xffffffff;
match.any.sync.u32 %r1, %r2, 0xffffffff;
vote.sync.ballot.pred %p1, %p2, 0xffffffff;
ex2.approx.f64 %e1, %e2;
sin.approx.f64 %e1, %e2;
lop3.b64 %d1, %d2, %d3, %d4, 0x80;
prmt.b64 %d1, %d2, %d3, %r4;
nanosleep.u64 %d1;
ld.global.pred %p1, [%d2];
ld.global.f16 %h1, [%d2];
st.global.pred [%d2], %p1;
# Modifiers that are missing.
mul.u32 %r1, %r2, %r3;
mad.s32 %r1, %r2, %r3, %r4;
div.f64 %e1, %e2, %e3;
div.f32 %f1, %f2, %f3;
fma.f32 %f1, %f2, %f3, %f4;
sqrt.f32 %f1, %f2;
rcp.f64 %e1, %e2;
ex2.f32 %f1, %f2;
setp.u32 %p1, %r2, %r3;
cvt.f32.s32 %f1, %r2;
cvt.s32.f32 %r1, %f2;
cvt.f32.f64 %f1, %e2;
cvt.f16.f32 %h1, %f2;
cvt.bf16.f32 %h1, %f2;
cvt.u32 %r1, %r2;
shfl.sync.b32 %r1, %r2, 0, 31, 0xffffffff;
shfl.idx.b32 %r1, %r2, 0, 31;
vote.all.pred %p1, %p2;
shf.l.b32 %r1, %r2, %r3, %r4;
ld.global %r1, [%d2];
atom.global.u32 %r1, [%d2], %r3;
nanosleep 100;
prefetch.global [%d1];
bar 0;
bar.red.u32 %r1, 0, %p1;
membar;
fence.acq_rel;
# Modifiers that do not belong.
add.sat.u32 %r1, %r2, %r3;
add.sat.f64 %e1, %e2, %e3;
add.ftz.f64 %e1, %e2, %e3;
add.approx.f32 %f1, %f2, %f3;
mul.lo.f32 %f1, %f2, %f3;
mul.hi.sat.s32 %r1, %r2, %r3;
fma.full.f32 %f1, %f2, %f3, %f4;
div.full.f64 %e1, %e2, %e3;
min.NaN.f64 %e1, %e2, %e3;
tanh.approx.ftz.f32 %f1, %f2;
mov.ftz.f32 %f1, %f2;
setp.lt.ftz.s32 %p1, %r2, %r3;
cvt.rn.f64.f32 %e1, %f2;
cvt.rn.s32.f32 %r1, %f2;
cvt.rzi.f32.s32 %f1, %r2;
cvt.rni.u32.u64 %r1, %d2;
cvt.rn.relu.f32.f64 %f1, %e2;
st.global.nc.u32 [%d1], %r2;
st.global.ca.u32 [%d1], %r2;
ld.global.wt.u32 %r1, [%d2];
ld.shared.nc.u32 %r1, [%r2];
ld.acquire.global.u32 %r1, [%d2];
ld.release.gpu.global.u32 %r1, [%d2];
st.acquire.gpu.global.u32 [%d1], %r2;
ld.volatile.gpu.global.u32 %r1, [%d2];
st.const.u32 [cst], %r1;
atom.local.add.u32 %r1, [%d2], %r3;
red.acquire.gpu.global.add.u32 [%d2], %r3;
nanosleep.relaxed.u32 100;
prefetch.global.L3 [%d1];
prefetch.shared.L1 [%d1];
brkpt.uni;
exit.uni;
bar.red.xor.pred %p1, 0, %p2;
bar.red.add.u32 %r1, 0, %p2;
activemask.u32 %r1;
frob.u32 %r1, %r2;
add.u32.odd %r1, %r2, %r3;
# Types in the wrong order.
cvt.rn.s32.f32 %f1, %r2;
set.lt.f32.u32 %r1, %f2, %f3;
# Modifiers of later architectures.
add.bf16 %h1, %h2, %h3;
elect.sync %r1|%p1, 0xffffffff;
ld.shared::cluster.u32 %r1, [%r2];
stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r2};
cvt.rn.bf16.f64 %h1, %e2;
fence.acq_rel.cluster;
# Registers whose type does not fit.
add.f32 %r_s1, %r_s2, %r_s3;
add.f32 %f1, %f2, %e3;
add.u32 %f1, %r2, %r3;
add.u32 %r1, %d2, %r3;
add.u32 %r1, %r2, %p1;
add.f64 %f1, %e2, %e3;
mul.wide.u32 %r1, %r2, %r3;
mov.u32 %f1, %r2;
mov.f32 %r1, %r_s2;
mov.b64 %r1, %d2;
mov.pred %r1, %p1;
setp.lt.s32 %r1, %r2, %r3;
setp.lt.f32 %p1, %r_s2, %f3;
selp.b32 %r1, %r2, %r3, %r4;
and.pred %p1, %p2, %r3;
popc.b64 %d1, %d2;
shl.b64 %d1, %d2, %d3;
cvt.u64.u32 %r1, %r2;
cvt.rn.f32.s32 %r_s1, %r2;
cvt.f64.f32 %f1, %f2;
ld.global.f32 %r_s1, [%d2];
ld.global.u64 %r1, [%d2];
ld.global.u32 %r1, [%f2];
st.global.f64 [%d1], %f2;
st.global.u32 [%d1], %p2;
atom.global.add.f32 %r_s1, [%d2], %f3;
cvta.to.global.u64 %r1, %d2;
# Guards.
@%r1 add.u32 %r1, %r2, %r3;
@!%f1 bra L;
@ add.u32 %r1, %r2, %r3;
@%missing add.u32 %r1, %r2, %r3;
@1 bra L;
# Names that nobody declared.
mov.u32 %nothing, 1;
add.u32 %r1, %r77, %r3;
bra NOWHERE;
@%p1 bra NOWHERE;
mov.u64 %d1, nowhere;
ld.global.u32 %r1, [nowhere];
ld.param.u64 %d1, [nowhere];
mov.u32 %r1, %tid.q;
mov.u32 %r1, %tidd.x;
call.uni nobody, (%r1);
# Operands that are missing, too many or of the wrong kind.
add.u32 %r1, %r2;
add.u32 %r1, %r2, %r3, %r4;
add.u32;
mov.u32 %r1;
mad.lo.u32 %r1, %r2, %r3;
fma.rn.f32 %f1, %f2, %f3;
selp.b32 %r1, %r2, %r3;
setp.lt.s32 %p1, %r2;
setp.lt.and.s32 %p1, %r2, %r3;
setp.lt.s32 %p1, %r2, %r3, %p2;
lop3.b32 %r1, %r2, %r3, %r4;
lop3.b32 %r1, %r2, %r3, %r4, %r5;
bra;
bra 17;
bra %r1;
ret %r1;
exit %r1;
trap %r1;
brkpt 1;
nanosleep.u32;
ld.global.u32 %r1;
ld.global.u32 %r1, %r2;
st.global.u32 [%d1];
st.global.u32 %r1, [%d2];
atom.global.add.u32 %r1, [%d2];
atom.global.cas.b32 %r1, [%d2], %r3;
red.global.add.u32 %r1, [%d2], %r3;
bar.sync;
bar.arrive 1;
bar.sync 0, 32, 64;
shfl.sync.idx.b32 %r1, %r2, 0, 31;
vote.sync.all.pred %p1, %p2;
bar.sync %p1;
add.u32 1, %r2, %r3;
mov.u32 [%d1], %r2;
add.u32 %r1, [%d2], %r3;
add.u32 L, %r2, %r3;
st.global.u32 7, %r2;
ld.global.u32 5, [%d2];
add.u32 %tid.x, %r2, %r3;
add.u32 %r1, %tid.x, %r3;
add.u32 %r1, %r2, 1.5;
add.f32 %f1, %f2, 0f3F80;
add.f32 %f1, %f2, 1;
mov.u32 %r1, 0xZZ;
cp.async.ca.shared.global [%r1], [%d2], 5;
cp.async.cg.shared.global [%r1], [%d2], 8;
cp.async.wait_group;
cp.async.wait_group %r1;
# Vectors.
ld.global.v2.u32 %r1, [%d2];
ld.global.v2.u32 {%r1, %r2, %r3}, [%d2];
ld.global.v4.u32 {%r1, %r2}, [%d2];
ld.global.v3.u32 {%r1, %r2, %r3}, [%d2];
ld.global.v4.u64 {%d1, %d2, %d3, %d4}, [%d5];
ld.global.v8.u32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%d2];
ld.global.u32 {%r1, %r2}, [%d2];
st.global.v2.f32 [%d1], {%f1};
mov.b64 %d1, {%r1, %r2, %r3};
mov.b32 %r1, {%r2, %r3};
mov.b64 {%h1, %h2}, %d1;
mov.u64 %d1, {%r1, %r2};
# Matrices.
mma.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k16.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k16.row.col.bf16.bf16.bf16.bf16 {%r1,%r2}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r1,%r2};
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r_s1,%r_s2,%r_s3,%r_s4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%f5,%f6,%f7,%f8}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k8.row.col.s32.s8.s8.s32 {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r5}, {%r1,%r2,%r3,%r4};
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6};
ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1,%r2,%r3}, [%r4];
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1,%r2}, [%r4];
ldmatrix.sync.aligned.m8n8.x4.global.b16 {%r1,%r2,%r3,%r4}, [%d4];
ldmatrix.sync.aligned.m8n8.x1.shared.b32 {%r1}, [%r4];
movmatrix.sync.aligned.m8n8.b16 %r1, %r2;
mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r1,%r2,%r3,%r4};
mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%f1,%f2}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r1,%r2};
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%f5,%f6}, {%f1,%f2,%f3,%f4};
# Text that is no instruction.
add.u32 %r1 %r2, %r3;
add.u32 %r1,, %r3;
.u32 %r1, %r2;
ld.global.u32 %r1, [%d2;
ld.global.v2.u32 {%r1, %r2, [%d2];
mov.u32 %r1, "text";
123 %r1;
L: L: ret;
.reg .b32 %r1;
.reg .q32 %x;
.shared .b8 arr[-1];
.reg .b32 %r<3>;
.reg .b32 %z1; .reg .b32 %z<3>;
.reg .b32 twice, twice;
"#;

/// Statements that load: most differ from a refused one in one piece.
const TAKEN: &str = r#"
and.b32 %r1, %r2, %r3;
xor.b64 %d1, %d2, %d3;
not.pred %p1, %p2;
shr.s32 %r1, %r2, 3;
shl.b64 %d1, %d2, %r3;
selp.f32 %f1, %f2, %f3, %p1;
add.sat.s32 %r1, %r2, %r3;
add.s32 %r_s1, %r2, %r3;
add.f32 %r1, %r2, %r3;
add.rn.ftz.sat.f32 %f1, %f2, 0f3F800000;
add.f32 %f1, %f2, 1.0;
mul.wide.s32 %d1, %r2, %r3;
mul.hi.u64 %d1, %d2, 7;
mad.lo.s32 %r1, %r2, -3, %r4;
neg.s32 %r1, %r2;
popc.b64 %r1, %d2;
bfe.u32 %r1, %r2, 1, 2;
dp4a.u32.s32 %r1, %r2, %r3, %r4;
fma.rn.f32 %f1, %f2, %f3, %f4;
fma.rn.relu.bf16x2 %r1, %r2, %r3, %r4;
div.full.f32 %f1, %f2, %f3;
div.rn.f64 %e1, %e2, %e3;
sqrt.approx.f32 %f1, %f2;
rcp.approx.ftz.f64 %e1, %e2;
ex2.approx.ftz.f32 %f1, %f2;
tanh.approx.f32 %f1, %f2;
max.NaN.f32 %f1, %f2, %f3;
setp.lt.and.s32 %p1|%p2, %r2, %r3, !%p3;
setp.lo.u32 %p1, %r2, 5;
setp.equ.f32 %p1, %f2, %f3;
set.lt.u32.f32 %r1, %f2, %f3;
slct.u32.s32 %r1, %r2, %r3, %r4;
cvt.rn.f32.s32 %f1, %r2;
cvt.rzi.s32.f32 %r1, %f2;
cvt.f64.f32 %e1, %f2;
cvt.rn.bf16x2.f32 %r1, %f2, %f3;
cvt.u32.u8 %r1, %h2;
cvta.to.global.u64 %d1, %d2;
cvt.u16.u32 %h1, %tid.x;
mov.b64 %d1, {%r1, %r2};
mov.b64 {%r1, %r2}, %d1;
mov.b32 %r1, {%h1, %h2};
mov.b32 %r1, %f2;
mov.u32 %r1, %tid.x;
mov.u64 %d1, glob;
mov.u32 %r1, shar;
ld.global.nc.v4.f32 {%f1, %f2, %f3, %f4}, [%d2+16];
ld.global.u8 %r1, [%d2];
ld.global.v2.u64 {%d1, %d2}, [%d3];
ld.acquire.gpu.global.u32 %r1, [%d2];
ld.param.u64 %d1, [param];
ld.const.u32 %r1, [cst];
st.shared.v2.b32 [%r1], {%r2, %r3};
st.global.b8 [%d1], %h2;
st.release.sys.global.u32 [%d1], 7;
atom.global.gpu.acq_rel.add.u32 %r1, [%d2], %r3;
atom.shared.cas.b32 %r1, [shar], %r3, %r4;
atom.global.add.f64 %e1, [%d2], %e3;
red.global.add.noftz.f16x2 [%d2], %r3;
bar.sync 0;
bar.arrive 1, 64;
bar.red.and.pred %p1, 0, %p2;
bar.warp.sync 0xffffffff;
barrier.sync.aligned 1, 64;
shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, 0xffffffff;
vote.sync.ballot.b32 %r1, !%p2, 0xffffffff;
match.any.sync.b32 %r1, %r2, 0xffffffff;
redux.sync.add.s32 %r1, %r2, 0xffffffff;
activemask.b32 %r1;
lop3.b32 %r1, %r2, %r3, %r4, 0x96;
prmt.b32 %r1, %r2, %r3, 0x5410;
shf.l.wrap.b32 %r1, %r2, %r3, %r4;
fence.acq_rel.gpu;
membar.gl;
cp.async.cg.shared.global [%r1], [%d2], 16;
cp.async.ca.shared.global [%r1], [%d2], 4, 0;
cp.async.wait_group 1;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r1,%r2,%r3,%r4};
ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r1,%r2,%r3,%r4}, [%r4];
movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r2;
nanosleep.u32 100;
prefetch.global.L2 [%d1];
brkpt;
trap;
@%p1 bra L;
@!%p1 bra.uni L;
@%p1 add.u32 %r1, %r2, %r3;
{ .reg .f32 %r1; mov.f32 %r1, 0f3F800000; }
slct.s32.f32 %r1, %r2, %r3, %r4;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r1,%r2,%r3,%r4};
mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%r_s1,%r2,%r3,%r4}, {%f1,%f2,%f3,%f4}, {%r5,%r6}, {%r1,%r2,%r3,%r4};
mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%e1,%d2}, {%e1}, {%d1}, {%e1,%e2};
ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%f1}, [%r4];
.reg .b32 %r10, %z; .reg .b32 %z<3>;
.reg .b32 glob;
{ .reg .b64 %r<3>; mov.b64 %r1, 1; }
"#;

fn statements(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter(|l| !l.is_empty() && !l.starts_with('#'))
}

/// What loading a kernel with this statement on line [`LINE`] says.
fn load(statement: &str) -> Result<(), String> {
    let text = format!(
        ".version 8.8\n.target sm_80\n.address_size 64\n.global .align 16 .b8 glob[64];\n.const .align 16 .b8 cst[64];\n\
         .shared .align 16 .b8 shar[64];\n.entry some_kernel(.param .u64 param) {{\n\
         .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .f32 %f<9>; .reg .f64 %e<9>; .reg .s32 %r_s<9>;\n\
         {statement}\nL: ret;\n}}\n"
    );
    Module::load(&text, &mut Memory::new()).map(drop).map_err(|e| e.to_string())
}

#[test]
fn what_the_assembler_refuses_is_refused_with_kernel_and_line() {
    let place = format!("kernel some_kernel, PTX line {LINE}: ");
    let mut wrong = String::new();
    for statement in statements(REFUSED) {
        match load(statement) {
            Ok(()) => writeln!(wrong, "{statement}\n    loads").unwrap(),
            Err(e) if !e.starts_with(&place) => writeln!(wrong, "{statement}\n    {e}").unwrap(),
            Err(_) => {}
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn what_the_assembler_takes_loads() {
    let mut wrong = String::new();
    for statement in statements(TAKEN) {
        if let Err(e) = load(statement) {
            writeln!(wrong, "{statement}\n    {e}").unwrap();
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}
