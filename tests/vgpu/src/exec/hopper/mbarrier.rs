//! The barrier object of shared memory: phases, arrival counts and transaction bytes, exactly as the ISA text counts them.
//!
//! A phase ends when no arrival is pending and the transaction count is zero; the pending count then starts again at the
//! expected count. Source: PTX ISA, "mbarrier" (contents, phase, tracking of asynchronous operations).

/// Largest arrival count and transaction count.
pub const LIMIT: i64 = (1 << 20) - 1;
/// Bytes of the object, and its alignment.
pub const BYTES: u64 = 8;

/// A barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Barrier {
    /// Phases completed since it was initialised.
    pub phase: u64,
    /// Arrivals that each phase needs.
    pub expected: u32,
    /// Arrivals that this phase still needs.
    pub pending: u32,
    /// Bytes announced and not yet delivered; negative when more were delivered than announced.
    pub tx: i64,
}

/// How an arrival differs from the plain one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// `.noComplete`: it must not end the phase.
    pub no_complete: bool,
    /// `arrive_drop`: later phases expect that many fewer.
    pub drop: bool,
}

impl Barrier {
    /// A barrier in phase 0.
    ///
    /// # Errors
    /// The count is not 1 to 2^20 - 1.
    pub fn new(count: u32) -> Result<Barrier, String> {
        if count == 0 || i64::from(count) > LIMIT {
            return Err(format!("initialised with count {count}, which is not 1 to {LIMIT}"));
        }
        Ok(Barrier { phase: 0, expected: count, pending: count, tx: 0 })
    }

    /// Announces bytes.
    ///
    /// # Errors
    /// The transaction count leaves its range.
    pub fn expect_tx(&mut self, bytes: u32) -> Result<(), String> {
        self.change_tx(i64::from(bytes))
    }

    /// Counts bytes as delivered; whether that ended the phase.
    ///
    /// # Errors
    /// The transaction count leaves its range.
    pub fn complete_tx(&mut self, bytes: u32) -> Result<bool, String> {
        self.change_tx(-i64::from(bytes))?;
        Ok(self.turn())
    }

    fn change_tx(&mut self, by: i64) -> Result<(), String> {
        let tx = self.tx + by;
        if tx.abs() > LIMIT {
            return Err(format!("{by:+} bytes make the transaction count {tx}, beyond {LIMIT}; {self}"));
        }
        self.tx = tx;
        Ok(())
    }

    /// An arrival of `count`; returns the state before it and whether it ended the phase.
    ///
    /// # Errors
    /// More arrivals than are pending, or `.noComplete` on what ends the phase.
    pub fn arrive(&mut self, count: u32, how: Arrival) -> Result<(u64, bool), String> {
        if count == 0 || i64::from(count) > LIMIT {
            return Err(format!("arrival of count {count}, which is not 1 to {LIMIT}; {self}"));
        }
        if count > self.pending {
            return Err(format!("arrival of count {count}, but only {} pending; {self}", self.pending));
        }
        if how.no_complete && count == self.pending && self.tx == 0 {
            return Err(format!("an arrival with .noComplete ends the phase; {self}"));
        }
        let token = self.token();
        if how.drop {
            self.expected -= count;
        }
        self.pending -= count;
        Ok((token, self.turn()))
    }

    fn turn(&mut self) -> bool {
        let over = self.pending == 0 && self.tx == 0;
        if over {
            self.phase += 1;
            self.pending = self.expected;
        }
        over
    }

    /// The opaque state that arrivals return: phase above, pending count below.
    pub fn token(&self) -> u64 {
        (self.phase & 0xfff_ffff_ffff) << 20 | u64::from(self.pending)
    }

    /// Whether the phase of a token is over.
    ///
    /// # Errors
    /// The token is neither of the current nor of the preceding phase.
    pub fn over(&self, token: u64) -> Result<bool, String> {
        match self.phase.wrapping_sub(token >> 20) {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(format!(
                "a wait with a state of phase {}, neither the current nor the one before; {self}",
                token >> 20
            )),
        }
    }

    /// Whether the phase of a parity is over.
    pub fn over_parity(&self, parity: bool) -> bool {
        (self.phase & 1 == 1) != parity
    }
}

/// `mbarrier.pending_count` of a token.
pub fn pending_count(token: u64) -> u32 {
    (token & 0xf_ffff) as u32
}

impl std::fmt::Display for Barrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "phase {} (parity {}), {} of {} arrived, {} bytes outstanding",
            self.phase,
            self.phase & 1,
            self.expected.saturating_sub(self.pending),
            self.expected,
            self.tx
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Arrival = Arrival { no_complete: false, drop: false };

    #[test]
    fn phases_end_when_arrivals_and_bytes_are_in() {
        let mut b = Barrier::new(2).unwrap();
        assert!(!b.over_parity(false) && b.over_parity(true));
        let (t, over) = b.arrive(1, PLAIN).unwrap();
        assert_eq!((over, pending_count(t), b.over(t)), (false, 2, Ok(false)));
        b.expect_tx(100).unwrap();
        assert!(!b.arrive(1, PLAIN).unwrap().1);
        // Nobody is pending now: one more arrival is a mistake.
        assert!(b.arrive(1, PLAIN).unwrap_err().contains("only 0 pending"));
        assert_eq!(b.complete_tx(60), Ok(false));
        assert_eq!(b.complete_tx(40), Ok(true));
        assert_eq!((b.phase, b.pending, b.tx, b.over(t)), (1, 2, 0, Ok(true)));
        assert!(b.over_parity(false) && !b.over_parity(true));
        assert!(b.arrive(2, PLAIN).unwrap().1);
        assert!(b.over(t).unwrap_err().contains("neither the current"));
    }

    #[test]
    fn bytes_may_come_before_they_are_announced() {
        let mut b = Barrier::new(1).unwrap();
        assert_eq!(b.complete_tx(64), Ok(false));
        b.expect_tx(64).unwrap();
        assert!(b.arrive(1, PLAIN).unwrap().1);
    }

    #[test]
    fn limits_and_kinds_of_arrival() {
        assert!(Barrier::new(0).is_err() && Barrier::new(1 << 20).is_err());
        let mut b = Barrier::new((1 << 20) - 1).unwrap();
        b.expect_tx((1 << 20) - 1).unwrap();
        assert!(b.expect_tx(1).unwrap_err().contains("beyond 1048575"));
        assert!(b.arrive(0, PLAIN).is_err() && b.arrive(1 << 20, PLAIN).is_err());
        b.complete_tx((1 << 20) - 1).unwrap();
        b.complete_tx((1 << 20) - 1).unwrap();
        assert!(b.complete_tx(1).is_err());
        let mut b = Barrier::new(3).unwrap();
        let quiet = Arrival { no_complete: true, ..PLAIN };
        b.arrive(2, quiet).unwrap();
        assert!(b.arrive(1, quiet).unwrap_err().contains("noComplete"));
        let drop = Arrival { drop: true, ..PLAIN };
        assert!(b.arrive(1, drop).unwrap().1);
        assert_eq!((b.expected, b.pending), (2, 2));
    }
}
