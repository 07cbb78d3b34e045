//! The decoder: layer by layer forward, the head and its loss, and layer by layer back to the lowest trained weight.
//!
//! ```text
//! x      = embed[tokens]
//! x      = mlp(attention(x))                     for each layer: attention.rs, mlp.rs
//! hidden = norm(x);  loss = cross_entropy(hidden·head)
//! ```

use super::acts::Acts;
use super::pass::Pass;
use super::scratch::{BackScratch, TRAINING};
use super::weights::Place;
use super::{Grads, Model, Params, Recompute, attention, mlp};
use crate::backend::{Backend, HeadGrads, HeadLoss, MatMul, Write};
use crate::error::Result;
use crate::tensor::DType;

/// Runs the loaded micro-batch up to the final norm, with LoRA dropout: the forward pass of training.
///
/// # Errors
/// If the device refuses a launch.
pub fn forward<B: Backend>(dev: &B, model: &Model<B>, a: &mut Acts<B>) -> Result<()> {
    run(dev, model, a, model.dropout())
}

/// As [`forward`], of a model whose weights may still be on their way: `on_need` is called before a part of them is read first, the parts
/// of [`Ready::all`] from the last one on.
///
/// # Errors
/// If the device refuses a launch, or the first error of `on_need`.
pub fn forward_with<B: Backend>(dev: &B, model: &mut Model<B>, a: &mut Acts<B>, on_need: &mut OnNeed<B>) -> Result<()> {
    let dropout = model.dropout();
    for at in Ready::all(model.params.layers.len()).rev() {
        on_need(at, &mut model.params)?;
        run_part(dev, model, a, dropout, at)?;
    }
    Ok(())
}

/// Runs the loaded micro-batch up to the final norm without dropout.
///
/// # Errors
/// If the device refuses a launch.
pub fn evaluate<B: Backend>(dev: &B, model: &Model<B>, a: &mut Acts<B>) -> Result<()> {
    run(dev, model, a, None)
}

/// Runs the loaded micro-batch without dropout and computes each token's loss and whether its arg max is right:
/// [`Acts::losses`], [`Acts::corrects`]. No gradients.
///
/// # Errors
/// If the device refuses a launch.
pub fn loss<B: Backend>(dev: &B, model: &Model<B>, a: &mut Acts<B>) -> Result<()> {
    evaluate(dev, model, a)?;
    let Acts { losses, correct, hidden, batch, slot, .. } = a;
    let of = HeadLoss { x: hidden, w: model.head(), batch, n_classes: model.config.n_classes, scale: 1.0 };
    dev.linear_cross_entropy(&mut losses[*slot], Some(correct), HeadGrads::none(), of)
}

/// Logits of all tokens of the loaded micro-batch, (N, V) row-major, without dropout. For inspection and tests: training never
/// forms them.
///
/// # Errors
/// If the device has not enough memory or refuses a launch.
pub fn logits<B: Backend>(dev: &B, model: &Model<B>, a: &mut Acts<B>) -> Result<Vec<f32>> {
    evaluate(dev, model, a)?;
    let mut out = dev.alloc(a.n_tokens(), model.config.vocab_size, DType::F32)?;
    dev.matmul(&mut out, &a.hidden, model.head(), MatMul::NT, 1.0, Write::Set)?;
    let mut host = vec![0.0; out.len()];
    dev.download(&mut host, &out)?;
    Ok(host)
}

fn run<B: Backend>(dev: &B, model: &Model<B>, a: &mut Acts<B>, dropout: Option<f32>) -> Result<()> {
    Ready::all(model.params.layers.len()).rev().try_for_each(|at| run_part(dev, model, a, dropout, at))
}

/// The embedding, a layer, or the final norm.
fn run_part<B: Backend>(dev: &B, model: &Model<B>, a: &mut Acts<B>, dropout: Option<f32>, at: Ready) -> Result<()> {
    let dropout = dropout.map(|p| (a.dropout_key, p));
    let Acts { table, batch, x, mid, attn, mlp, scratch: s, hidden, rstd, .. } = a;
    let pass = Pass::new(dev, model, batch, table, dropout);
    let (streams, mids, attns, mlps) = (x.len(), mid.len(), attn.len(), mlp.len());
    match at {
        Ready::Embed => dev.embedding_forward(&mut x[0], &model.params.embed, &batch.tokens),
        Ready::Layer(i) => {
            let (pass, layer) = (pass.at(i), &model.params.layers[i]);
            let (mid, a, m) = (&mut mid[i % mids], &mut attn[i % attns], &mut mlp[i % mlps]);
            attention::attend(pass, layer, &x[i % streams], a, s)?;
            attention::output(pass, layer, mid, &x[i % streams], &a.out, &mut m.t_o, s)?;
            mlp::gate_up(pass, layer, mid, m, s)?;
            mlp::down(pass, layer, &mut x[(i + 1) % streams], mid, m, s)
        }
        Ready::Head => {
            let last = &x[model.params.layers.len() % streams];
            dev.rmsnorm_forward(hidden, rstd, pass.norm(last, &model.params.final_norm))
        }
    }
}

/// What is done before a part of the weights is read, which may still be on its way.
pub type OnNeed<'a, B> = dyn FnMut(Ready, &mut Params<B>) -> Result<()> + 'a;

/// A part of the weights, whose gradients are final together for a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// The head, where it has a weight of its own, and the final norm.
    Head,
    /// A layer.
    Layer(usize),
    /// The embedding, which is the head too where they are tied.
    Embed,
}

impl Ready {
    /// The part that a weight belongs to.
    pub fn of(at: Place) -> Self {
        match at {
            Place::Head | Place::FinalNorm => Ready::Head,
            Place::Layer(i, _) => Ready::Layer(i),
            Place::Embed => Ready::Embed,
        }
    }

    /// Which layer it is, if it is one.
    pub fn layer(self) -> Option<usize> {
        if let Ready::Layer(i) = self { Some(i) } else { None }
    }

    /// Its number in [`Ready::all`].
    pub fn number(self, n_layers: usize) -> usize {
        match self {
            Ready::Head => 0,
            Ready::Layer(i) => n_layers - i,
            Ready::Embed => n_layers + 1,
        }
    }

    /// All parts of a model of `n_layers` layers, in the order in which backward announces them.
    pub fn all(n_layers: usize) -> impl DoubleEndedIterator<Item = Ready> {
        [Ready::Head].into_iter().chain((0..n_layers).rev().map(Ready::Layer)).chain([Ready::Embed])
    }
}

/// What is done with the gradients of a part as soon as they are final for this micro-batch, so that their reduction can overlap
/// the layers below.
pub type OnReady<'a, B> = dyn FnMut(Ready, &mut Grads<B>) -> Result<()> + 'a;

/// Adds the gradients of `scale · summed loss` of the micro-batch that [`forward`] ran; sets [`Acts::losses`]. Every part of
/// [`Ready::all`] is announced once, in that order, whatever is trained.
///
/// # Errors
/// If the device refuses a launch, or the first error of `on_ready`.
///
/// # Panics
/// If the activations were not allocated for training.
pub fn backward<B: Backend>(
    dev: &B,
    model: &Model<B>,
    g: &mut Grads<B>,
    a: &mut Acts<B>,
    scale: f32,
    on_ready: &mut OnReady<B>,
) -> Result<()> {
    let n_layers = model.params.layers.len();
    // What lies below the lowest trained weight needs no gradient.
    let lowest = if g.embed.is_some() { 0 } else { lowest_trained_layer(g) };
    let needs_hidden = lowest < n_layers || g.final_norm.is_some();
    head_backward(dev, model, g, a, scale, needs_hidden)?;
    on_ready(Ready::Head, g)?;
    for i in (0..n_layers).rev() {
        if i >= lowest {
            layer_backward(dev, model, g, a, i, g.embed.is_some() || i > lowest)?;
        }
        on_ready(Ready::Layer(i), g)?;
    }
    embedding_backward(dev, model, g, a)?;
    on_ready(Ready::Embed, g)
}

/// The head with its loss and the final norm: `dres` becomes the gradient of the last layer's output.
fn head_backward<B: Backend>(
    dev: &B,
    model: &Model<B>,
    g: &mut Grads<B>,
    a: &mut Acts<B>,
    scale: f32,
    needs_hidden: bool,
) -> Result<()> {
    let Acts { x, batch, table, scratch, hidden, rstd, losses, slot, .. } = a;
    let BackScratch { dres, dh, vocabulary, .. } = scratch.back.as_mut().expect(TRAINING);
    let tied = g.lm_head.is_none();
    let mut sum = if tied { g.embed.as_mut() } else { g.lm_head.as_mut().and_then(Option::as_mut) };
    let dw = match vocabulary.as_mut().filter(|_| sum.is_some()) {
        Some(own) => {
            dev.fill_zero(own)?;
            Some(own)
        }
        None => sum.as_deref_mut(),
    };
    let grads = HeadGrads { dx: needs_hidden.then_some(&mut *dh), dw, first_row: model.first_row(Place::Head) };
    let of = HeadLoss { x: hidden, w: model.head(), batch, n_classes: model.config.n_classes, scale };
    dev.linear_cross_entropy(&mut losses[*slot], None, grads, of)?;
    // Of tied weights the embedding's part comes on top before it is added.
    if let (Some(sum), Some(own), false) = (sum, vocabulary, tied) {
        dev.add(sum, own)?;
    }
    if !needs_hidden {
        return Ok(());
    }
    let pass = Pass::new(dev, model, batch, table, None);
    let norm = pass.norm(x.last().expect("the input of the final norm"), &model.params.final_norm);
    dev.rmsnorm_backward(dres, g.final_norm.as_mut(), dh, rstd, norm, Write::Set)
}

/// The embedding, which holds the head's gradient of this micro-batch already where they are tied.
fn embedding_backward<B: Backend>(dev: &B, model: &Model<B>, g: &mut Grads<B>, a: &mut Acts<B>) -> Result<()> {
    let BackScratch { dres, vocabulary, .. } = a.scratch.back.as_mut().expect(TRAINING);
    let first_row = model.first_row(Place::Embed);
    match (&mut g.embed, vocabulary) {
        (Some(sum), Some(own)) => {
            if g.lm_head.is_some() {
                dev.fill_zero(own)?;
            }
            dev.embedding_backward(own, dres, &a.batch, first_row)?;
            dev.add(sum, own)
        }
        (Some(sum), None) => dev.embedding_backward(sum, dres, &a.batch, first_row),
        (None, _) => Ok(()),
    }
}

/// One layer: what was not kept again, then its two blocks back.
fn layer_backward<B: Backend>(
    dev: &B,
    model: &Model<B>,
    g: &mut Grads<B>,
    a: &mut Acts<B>,
    i: usize,
    needs_input: bool,
) -> Result<()> {
    let dropout = model.dropout().map(|p| (a.dropout_key, p));
    let Acts { recompute, table, batch, x, mid, attn, mlp, scratch: s, .. } = a;
    let pass = Pass { needs_input, ..Pass::new(dev, model, batch, table, dropout).at(i) };
    let (layer, grads) = (&model.params.layers[i], &mut g.layers[i]);
    let (mids, attns, mlps) = (mid.len(), attn.len(), mlp.len());
    let (x, mid, a, m) = (&x[i], &mut mid[i % mids], &mut attn[i % attns], &mut mlp[i % mlps]);
    if *recompute != Recompute::None {
        attention::attend(pass, layer, x, a, s)?;
    }
    if *recompute == Recompute::Layer {
        attention::output(pass, layer, mid, x, &a.out, &mut m.t_o, s)?;
        mlp::gate_up(pass, layer, mid, m, s)?;
        mlp::down_again(pass, layer, m, s)?;
    }
    mlp::backward(pass, layer, grads, mid, m, s)?;
    attention::backward(pass, layer, grads, x, a, &m.t_o, s)
}

/// The first layer with a trained weight; their number where there is none.
fn lowest_trained_layer<B: Backend>(g: &Grads<B>) -> usize {
    let trained = g.places().into_iter().filter(|(_, grad)| grad.is_some());
    trained.filter_map(|(at, _)| at.layer()).min().unwrap_or(g.layers.len())
}
