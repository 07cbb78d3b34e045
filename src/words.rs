//! Words of an enum: how its variants are spelled on the command line, in config files and in reports.

/// An enum whose variants have words; `words!` implements it.
pub trait Words: Copy + 'static {
    /// Every word, in the order of help and messages.
    const WORDS: &'static [&'static str];

    /// The variant of a word.
    fn of_word(word: &str) -> Option<Self>;

    /// The word of a variant, the first where it has several.
    fn word(self) -> &'static str;
}

/// One list of variants and their words. A variant that it leaves out does not compile; those after `but` are no choice of a
/// user. `Steps(0) = "steps"`: what the variant holds is said elsewhere, and 0 until then.
macro_rules! words {
    ($name:ty { $($variant:ident $(($start:literal))? = $word:literal $(| $more:literal)*),+ $(,)? } $(but $($none:ident),+)?) => {
        impl $crate::words::Words for $name {
            const WORDS: &'static [&'static str] = &[$($word $(, $more)*),+];

            fn of_word(word: &str) -> Option<Self> {
                match word {
                    $($word $(| $more)* => Some(Self::$variant $(($start))?),)+
                    _ => None,
                }
            }

            fn word(self) -> &'static str {
                match self {
                    $(Self::$variant { .. } => $word,)+
                    $($(Self::$none)|+ => unreachable!("{self:?} has no word"),)?
                }
            }
        }
    };
}
pub(crate) use words;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fruit {
        Apple,
        Pear,
        Melon(u8),
        Stone,
    }
    words!(Fruit { Apple = "apple" | "pome", Pear = "pear", Melon(1) = "melon" } but Stone);

    #[test]
    fn words_and_variants_agree() {
        assert_eq!(Fruit::WORDS, ["apple", "pome", "pear", "melon"]);
        assert_eq!((Fruit::of_word("pome"), Fruit::of_word("stone")), (Some(Fruit::Apple), None));
        assert_eq!((Fruit::Apple.word(), Fruit::Pear.word()), ("apple", "pear"));
        assert_eq!((Fruit::of_word("melon"), Fruit::Melon(7).word()), (Some(Fruit::Melon(1)), "melon"));
        assert!(std::panic::catch_unwind(|| Fruit::Stone.word()).is_err());
    }
}
