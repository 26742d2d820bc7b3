//! What is live while events come in one after the other: it gives allocations their ids and finds them again for frees.

use rustc_hash::FxHashMap;

use crate::row::Id;

/// A live block of frames.
#[derive(Clone, Copy)]
struct Block {
    pfn: u64,
    order: u8,
    migratetype: u8,
}

/// A block that has to be split before a part of it can be freed.
pub(crate) struct Split {
    pub id: Id,
    pub pfn: u64,
    pub order: u8,
    pub migratetype: u8,
    /// Id of the lower half; the upper one's is the next.
    pub first: Id,
}

/// All that is live, and the numbers of the names seen.
#[derive(Default)]
pub(crate) struct Live {
    next: u64,
    /// The block each live frame is in.
    frames: FxHashMap<u64, Id>,
    blocks: FxHashMap<Id, Block>,
    /// Id, bytes requested and bytes allocated of each live object.
    objects: FxHashMap<u64, (Id, u32, u32)>,
    sites: FxHashMap<String, u16>,
    caches: FxHashMap<String, u16>,
}

impl Live {
    fn id(&mut self) -> Result<Id, String> {
        // The last number is kept free: binary forms write it for "no id".
        let id = Id::try_from(self.next).ok().filter(|id| *id < Id::MAX - 1);
        self.next += 1;
        id.ok_or_else(|| "more allocations than 32 bits can number".to_owned())
    }

    fn begin(&mut self, id: Id, block: Block) {
        for frame in block.pfn..block.pfn + (1 << block.order) {
            self.frames.insert(frame, id);
        }
        self.blocks.insert(id, block);
    }

    fn end(&mut self, id: Id) {
        if let Some(block) = self.blocks.remove(&id) {
            (block.pfn..block.pfn + (1 << block.order)).for_each(|frame| {
                self.frames.remove(&frame);
            });
        }
    }

    /// A block is allocated. What was live there is not any more: its free is missing from the text.
    pub(crate) fn alloc_block(
        &mut self,
        pfn: u64,
        order: u8,
        migratetype: u8,
    ) -> Result<Id, String> {
        for frame in pfn..pfn + (1 << order) {
            if let Some(id) = self.frames.get(&frame).copied() {
                self.end(id);
            }
        }
        let id = self.id()?;
        self.begin(id, Block { pfn, order, migratetype });
        Ok(id)
    }

    /// Whether a live block holds this frame.
    pub(crate) fn has_frame(&self, pfn: u64) -> bool {
        self.frames.contains_key(&pfn)
    }

    /// Splits the live block around `pfn` until the block at `pfn` has the given order, if there is a larger one.
    pub(crate) fn split_for(&mut self, pfn: u64, order: u8) -> Result<Vec<Split>, String> {
        let mut splits = Vec::new();
        while let Some(id) = self.frames.get(&pfn).copied()
            && let Some(block) = self.blocks.get(&id).copied()
            && block.order > order
        {
            let (first, second) = (self.id()?, self.id()?);
            self.end(id);
            let half = Block { order: block.order - 1, ..block };
            self.begin(first, half);
            self.begin(second, Block { pfn: block.pfn + (1 << half.order), ..half });
            let Block { pfn, order, migratetype } = block;
            splits.push(Split { id, pfn, order, migratetype, first });
        }
        Ok(splits)
    }

    /// The block at `pfn` of this order is freed: its id and mobility type, if it is live.
    pub(crate) fn free_block(&mut self, pfn: u64, order: u8) -> Option<(Id, u8)> {
        let id = *self.frames.get(&pfn)?;
        let block = *self.blocks.get(&id)?;
        if (block.pfn, block.order) != (pfn, order) {
            return None;
        }
        self.end(id);
        Some((id, block.migratetype))
    }

    /// An object is allocated.
    pub(crate) fn alloc_object(
        &mut self,
        address: u64,
        requested: u32,
        allocated: u32,
    ) -> Result<Id, String> {
        let id = self.id()?;
        self.objects.insert(address, (id, requested, allocated));
        Ok(id)
    }

    /// The object at `address` is freed: its id and sizes, if it is live.
    pub(crate) fn free_object(&mut self, address: u64) -> Option<(Id, u32, u32)> {
        self.objects.remove(&address)
    }

    /// The number of a call site, a new one if there is room for it in `sites`, else 0.
    pub(crate) fn site(&mut self, name: &str, sites: &mut Vec<String>) -> u16 {
        if let Some(site) = self.sites.get(name) {
            return *site;
        }
        let Ok(site) = u16::try_from(sites.len()) else {
            return 0;
        };
        sites.push(name.to_owned());
        self.sites.insert(name.to_owned(), site);
        site
    }

    /// The number of a cache's name, or `None` when there are too many.
    pub(crate) fn cache(&mut self, name: &str) -> Option<u16> {
        if let Some(cache) = self.caches.get(name) {
            return Some(*cache);
        }
        let cache = u16::try_from(self.caches.len()).ok().filter(|cache| *cache < u16::MAX)?;
        self.caches.insert(name.to_owned(), cache);
        Some(cache)
    }
}
