//! A table of what is in flight, by token.

use super::Token;

/// Remembers a `T` for each operation in flight and names it by a token in a range of its own.
#[derive(Debug)]
pub struct Tokens<T> {
    base: u64,
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Tokens<T> {
    /// Tokens count up from `base`.
    #[must_use]
    pub const fn new(base: u64) -> Self {
        Self {
            base,
            slots: Vec::new(),
            free: Vec::new(),
        }
    }

    pub fn insert(&mut self, value: T) -> Token {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        self.slots[slot as usize] = Some(value);
        Token(self.base + u64::from(slot))
    }

    /// What the token was given for; it is free again after.
    ///
    /// # Panics
    /// If the token is not in flight: completions come exactly once.
    pub fn take(&mut self, token: Token) -> T {
        let slot = (token.0 - self.base) as usize;
        let value = self.slots[slot]
            .take()
            .expect("a completion comes once, for what was submitted");
        self.free.push(slot as u32);
        value
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Moves the range; nothing may be in flight.
    ///
    /// # Panics
    /// If something is.
    pub fn rebase(&mut self, base: u64) {
        assert!(
            self.is_empty(),
            "tokens cannot move while operations are in flight"
        );
        self.base = base;
    }
}
