//! Why a run ended: the first thing that went wrong, said once.

use serde_json::{Value, json};

use crate::beacon::Position;

/// Exit code of a rank that ended because of another one.
pub const BYSTANDER: u8 = 76;
/// Exit code of a run that was stopped by a signal with its state saved.
pub const REQUEUE: u8 = 75;
/// Exit code of a run that was ended because a rank gave no sign of life, or none went on.
pub const HANG: u8 = 124;

/// The first cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The rank it happened to.
    pub rank: usize,
    /// Its machine.
    pub host: String,
    /// Where it was, as far as that is known.
    pub position: Option<Position>,
    /// What happened.
    pub text: String,
    /// Exit code of the whole run.
    pub code: u8,
}

impl Cause {
    /// `rank 3 on host b: step 120, backward, layer 7: killed by SIGKILL`.
    pub fn line(&self) -> String {
        let at = self.position.map_or(String::new(), |at| format!("{at}: "));
        format!("rank {} on host {}: {at}{}", self.rank, self.host, self.text)
    }

    /// As JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "rank": self.rank, "host": self.host, "position": self.position.map(Position::pack), "text": self.text,
            "code": self.code, "line": self.line(),
        })
    }

    /// What [`Cause::to_json`] gave.
    pub fn from_json(v: &Value) -> Option<Self> {
        Some(Self {
            rank: usize::try_from(v["rank"].as_u64()?).ok()?,
            host: v["host"].as_str()?.into(),
            position: v["position"].as_u64().map(Position::unpack),
            text: v["text"].as_str()?.into(),
            code: u8::try_from(v["code"].as_u64()?).ok()?,
        })
    }
}

/// The name of a signal.
pub fn signal_name(signal: i32) -> String {
    match signal_hook::low_level::signal_name(signal) {
        Some(name) => name.into(),
        None => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::beacon::Phase;

    #[test]
    fn a_cause_is_a_line_and_survives_json() {
        let position = Some(Position { step: 120, phase: Phase::Backward, layer: Some(7) });
        let text = format!("killed by {}", signal_name(libc::SIGKILL));
        let cause = Cause { rank: 3, host: "b".into(), position, text, code: 137 };
        assert_eq!(cause.line(), "rank 3 on host b: step 120, backward, layer 7: killed by SIGKILL");
        assert_eq!(Cause::from_json(&cause.to_json()), Some(cause));
        assert_eq!(Cause::from_json(&json!({"rank": -1})), None);
    }
}
