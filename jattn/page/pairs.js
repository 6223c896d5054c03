// A mask: its blocks, and the pairs inside its partial blocks, neither empty nor full.

const EMPTY = 0, PARTIAL = 1, FULL = 2;

class Pairs {
  constructor({ kinds, pattern_of, patterns }) {
    const [rows, columns] = facts.block;
    Object.assign(this, { kinds, patterns, rows, columns });
    this.across = Math.ceil(facts.S / columns);
    this.down = Math.ceil(facts.T / rows);
    this.bytes = Math.ceil(rows * columns / 8); // in a pattern
    this.pattern = new Uint32Array(kinds.length); // the pattern of each block, or 0
    let next = 0;
    kinds.forEach((kind, i) => { if (kind === PARTIAL) this.pattern[i] = pattern_of[next++]; });
  }

  block(query, key) {
    return Math.floor(query / this.rows) * this.across + Math.floor(key / this.columns);
  }

  kind(query, key) { return this.kinds[this.block(query, key)]; }

  // Says whether a query may attend to a key; null if the page does not know.
  allows(query, key) {
    const block = this.block(query, key), kind = this.kinds[block];
    if (kind !== PARTIAL) return kind === FULL;
    const pattern = this.pattern[block];
    if (!pattern) return null;
    const bit = (query % this.rows) * this.columns + key % this.columns;
    return Boolean(this.patterns[(pattern - 1) * this.bytes + (bit >> 3)] & (128 >> (bit & 7)));
  }

  // Makes a picture with one pixel for each block.
  blocksPicture(colours) {
    const canvas = make("canvas", { width: this.across, height: this.down });
    const image = new ImageData(this.across, this.down);
    const of = [colours.empty, colours.partial, colours.full];
    this.kinds.forEach((kind, i) => image.data.set([...of[kind], 255], 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  // Makes a picture of the pairs of these queries and keys, one pixel each.
  pairsPicture(queries, keys, colours) {
    const [height, width] = [queries.length, keys.length];
    const canvas = make("canvas", { width, height }), image = new ImageData(width, height);
    const words = new Uint32Array(image.data.buffer);
    const word = ([red, green, blue]) => (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
    const [no, yes, all, unknown, never] = ["gap", "some", "full", "partial", "empty"].map((name) => word(colours[name]));
    for (let t = 0; t < height; t++) {
      for (let s = 0; s < width; s++) {
        const kind = this.kind(queries[t], keys[s]);
        let colour = kind === FULL ? all : never;
        if (kind === PARTIAL) {
          const allowed = this.allows(queries[t], keys[s]);
          colour = allowed === null ? unknown : allowed ? yes : no;
        }
        words[t * width + s] = colour;
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }
}
