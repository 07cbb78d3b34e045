//! Handles: numbers that stand for objects. A handle is looked up, never followed, so a wrong one is an error and no crash.

use std::collections::BTreeMap;

use crate::code::{Code, Result};
use crate::ffi::Handle;

/// Objects of one kind by handle. Numbers are never used twice.
pub struct Table<T> {
    kind: usize,
    next: usize,
    objects: BTreeMap<usize, T>,
}

impl<T> Table<T> {
    /// An empty table; `kind` tells its handles from those of other tables.
    pub const fn new(kind: usize) -> Table<T> {
        Table { kind, next: 1, objects: BTreeMap::new() }
    }

    /// Takes an object in.
    pub fn insert(&mut self, object: T) -> Handle {
        // Odd numbers far from any real address: following one by mistake fails at once.
        let handle = self.kind << 40 | self.next << 4 | 1;
        self.next += 1;
        self.objects.insert(handle, object);
        Handle(handle)
    }

    /// The object, or `CUDA_ERROR_INVALID_HANDLE`.
    pub fn get(&self, handle: Handle) -> Result<&T> {
        self.objects.get(&handle.0).ok_or(Code::INVALID_HANDLE)
    }

    /// As [`Table::get`].
    pub fn get_mut(&mut self, handle: Handle) -> Result<&mut T> {
        self.objects.get_mut(&handle.0).ok_or(Code::INVALID_HANDLE)
    }

    /// Takes an object out.
    pub fn remove(&mut self, handle: Handle) -> Result<T> {
        self.objects.remove(&handle.0).ok_or(Code::INVALID_HANDLE)
    }

    /// Every object.
    pub fn iter(&self) -> impl Iterator<Item = (Handle, &T)> {
        self.objects.iter().map(|(h, t)| (Handle(*h), t))
    }

    /// As [`Table::iter`].
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Handle, &mut T)> {
        self.objects.iter_mut().map(|(h, t)| (Handle(*h), t))
    }

    /// Takes out every object that `f` names.
    pub fn remove_if(&mut self, f: impl Fn(&T) -> bool) -> Vec<T> {
        let gone: Vec<usize> = self.objects.iter().filter(|(_, t)| f(t)).map(|(h, _)| *h).collect();
        gone.iter().filter_map(|h| self.objects.remove(h)).collect()
    }
}
