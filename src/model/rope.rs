//! Angles of the rotary embedding, in f64, for every kind of scaling.

use super::config::{ModelConfig, RopeScaling};

/// Frequencies of a head, D/2 of them: `theta^(-2j/D)`, scaled.
///
/// Sources: Su et al. 2021, arXiv:2104.09864, section 3.2.2 (default); Chen et al. 2023, arXiv:2306.15595 (linear); Llama 3.1's
/// reference code, as in Hugging Face's `rope_type` "llama3".
pub fn frequencies(c: &ModelConfig) -> Vec<f64> {
    let d = c.heads.head_dim as f64;
    (0..c.heads.head_dim / 2).map(|j| scaled(c.rope_theta.powf(-2.0 * j as f64 / d), c.rope_scaling)).collect()
}

fn scaled(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Default => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            let length = original_max_position as f64;
            let wavelength = std::f64::consts::TAU / frequency;
            if wavelength < length / high_freq_factor {
                frequency
            } else if wavelength > length / low_freq_factor {
                frequency / factor
            } else {
                let smooth = (length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

/// The table of [`crate::backend::Backend::rope`] for positions `0..positions`: row p holds the D/2 cosines, then the D/2 sines.
pub fn table(c: &ModelConfig, positions: usize) -> Vec<f32> {
    let frequencies = frequencies(c);
    let mut out = Vec::with_capacity(positions * c.heads.head_dim);
    for p in 0..positions {
        let angle = |f: &f64| p as f64 * f;
        out.extend(frequencies.iter().map(|f| angle(f).cos() as f32));
        out.extend(frequencies.iter().map(|f| angle(f).sin() as f32));
    }
    out
}
