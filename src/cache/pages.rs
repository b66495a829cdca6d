//! Which pages are in use, and by how many sequences.
//!
//! A page number stands for the page of that number in every layer and head: sequences share all of it or nothing.

/// Reference counts and free list of the pages `0 .. capacity`.
#[derive(Debug)]
pub(super) struct Pages {
    capacity: usize,
    /// Sequences that hold each page ever used; 0 for one in `recycled`. Grows as pages are first used, so a pool of
    /// any size costs nothing up front.
    refs: Vec<u32>,
    recycled: Vec<u32>,
}

impl Pages {
    /// `capacity` is at most `i32::MAX`, what a block table can hold.
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, refs: Vec::new(), recycled: Vec::new() }
    }

    pub(super) fn in_use(&self) -> usize {
        self.refs.len() - self.recycled.len()
    }

    pub(super) fn free(&self) -> usize {
        self.capacity - self.in_use()
    }

    /// A free page, now held once. The caller has checked [`Pages::free`].
    pub(super) fn take(&mut self) -> u32 {
        if let Some(page) = self.recycled.pop() {
            self.refs[page as usize] = 1;
            return page;
        }
        assert!(self.refs.len() < self.capacity, "no free page");
        self.refs.push(1);
        (self.refs.len() - 1) as u32
    }

    pub(super) fn is_shared(&self, page: u32) -> bool {
        self.refs[page as usize] > 1
    }

    pub(super) fn retain(&mut self, page: u32) {
        self.refs[page as usize] += 1;
    }

    pub(super) fn release(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        *refs -= 1;
        if *refs == 0 {
            self.recycled.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pages;

    #[test]
    fn pages_are_counted_and_recycled() {
        let mut pages = Pages::new(4);
        let taken: Vec<u32> = (0..3).map(|_| pages.take()).collect();
        assert_eq!(taken, [0, 1, 2]);
        pages.retain(1);
        pages.release(1);
        assert_eq!((pages.in_use(), pages.free()), (3, 1));
        assert!(!pages.is_shared(1));
        pages.release(1);
        pages.release(0);
        let taken: Vec<u32> = (0..3).map(|_| pages.take()).collect();
        assert_eq!(taken, [0, 1, 3]);
        assert_eq!(pages.free(), 0);
    }
}
