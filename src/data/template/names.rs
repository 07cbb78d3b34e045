//! How the control tokens of a vocabulary are written, and which of them a text begins with.

use super::{Control, IM_END, IM_START};

/// The piece of a newline's byte.
pub const NEWLINE: &str = "<0x0A>";

/// The texts of control tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlNames {
    /// `bos_token` of a chat template; empty where a vocabulary has none.
    pub bos: String,
    /// `eos_token` of a chat template.
    pub eos: String,
    /// `pad_token`, where there is such a token.
    pub pad: Option<String>,
    /// `unk_token`, where there is such a token.
    pub unk: Option<String>,
    /// What the model's files call `eos_token`, where that is not the vocabulary's end: what a template prints under this name.
    pub said_eos: Option<String>,
    /// Newlines of a template are the byte's token, because the tokenizer loses them in text: saved templates spell [`NEWLINE`].
    pub byte_newlines: bool,
    /// Special tokens besides, with their ids.
    others: Vec<(String, u32)>,
    /// The first bytes of all names: most text has none of them, and is passed over quickly.
    starts: Vec<u8>,
}

impl Default for ControlNames {
    fn default() -> Self {
        let token = |text: &str| Some(text.to_string());
        Self::new("<s>", "</s>", token("<pad>"), token("<unk>"), Vec::new())
    }
}

impl ControlNames {
    /// With special tokens besides the usual ones.
    pub fn new(bos: &str, eos: &str, pad: Option<String>, unk: Option<String>, mut others: Vec<(String, u32)>) -> Self {
        others.retain(|(text, _)| !text.is_empty() && ![bos, eos, IM_START, IM_END].contains(&text.as_str()));
        let all = [bos, eos, IM_START].into_iter().chain(others.iter().map(|(text, _)| text.as_str()));
        let mut starts: Vec<u8> = all.filter_map(|text| text.bytes().next()).collect();
        starts.sort_unstable();
        starts.dedup();
        let byte_newlines = others.iter().any(|(text, _)| text == NEWLINE);
        Self { bos: bos.to_string(), eos: eos.to_string(), pad, unk, said_eos: None, byte_newlines, others, starts }
    }

    /// The text of a control token.
    pub fn of(&self, token: Control) -> &str {
        match token {
            Control::Bos => &self.bos,
            Control::Eos => &self.eos,
            Control::ImStart => IM_START,
            Control::ImEnd => IM_END,
            Control::Token(id) => self.others.iter().find(|(_, i)| *i == id).map_or("", |(text, _)| text),
        }
    }

    /// The control token that a text begins with, the longest where several do, as tokenizers match them.
    pub fn at(&self, text: &str) -> Option<(Control, &str)> {
        self.starts.binary_search(text.as_bytes().first()?).ok()?;
        self.all().filter(|(_, name)| !name.is_empty() && text.starts_with(name)).max_by_key(|(_, name)| name.len())
    }

    /// Whether a text ends with a control token.
    pub fn ends(&self, text: &str) -> bool {
        self.all().any(|(_, name)| !name.is_empty() && text.ends_with(name))
    }

    /// Every token; of two with one name the later is the one that is meant (ChatML's end may be EOS).
    fn all(&self) -> impl Iterator<Item = (Control, &str)> {
        let usual = [Control::Eos, Control::Bos, Control::ImEnd, Control::ImStart].map(|c| (c, self.of(c)));
        self.others.iter().map(|(text, id)| (Control::Token(*id), text.as_str())).chain(usual)
    }

    /// Everything that decides what is matched, for a fingerprint.
    pub(super) fn parts(&self) -> Vec<u8> {
        format!("{:?}", (&self.bos, &self.eos, &self.said_eos, &self.pad, &self.unk, &self.others)).into_bytes()
    }
}
