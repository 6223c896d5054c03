// The numbers of all heads. A slot is a head of a layer, or the mean over a layer's heads.

class Numbers {
  constructor(arrays) {
    this.arrays = arrays;
    this.slots = [];
    facts.heads.forEach((count, layer) => {
      for (let head = 0; head < count; head++) this.slots.push({ layer, head });
      this.slots.push({ layer, head: null });
    });
    this.columns = new Map();
    if (arrays.counts) this.index(arrays.counts);
  }

  // The places where the weights of each query of each slot begin.
  index(counts) {
    this.starts = new Uint32Array(counts.length + 1);
    for (let i = 0; i < counts.length; i++) this.starts[i + 1] = this.starts[i] + counts[i];
  }

  get hasWeights() { return Boolean(this.starts); }

  weightAt(entry) { return (this.arrays.weights[entry] / 65280) ** 2; }

  // Lists the keys that a query attends to in one slot, the strongest first.
  row(slot, query) {
    const at = slot * facts.T + query, found = [];
    for (let i = this.starts[at]; i < this.starts[at + 1]; i++) {
      found.push([this.arrays.keys[i], this.weightAt(i)]);
    }
    return found;
  }

  // Lists the queries that attend to a key in one slot. The first call for a slot sorts all
  // its entries by key, by counting.
  column(slot, key) {
    if (!this.columns.has(slot)) this.columns.set(slot, this.byKey(slot));
    const { starts, queries, entries } = this.columns.get(slot), found = [];
    for (let i = starts[key]; i < starts[key + 1]; i++) {
      found.push([queries[i], this.weightAt(entries[i])]);
    }
    return found;
  }

  byKey(slot) {
    const first = this.starts[slot * facts.T], last = this.starts[(slot + 1) * facts.T];
    const starts = new Uint32Array(facts.S + 1), { keys } = this.arrays;
    for (let i = first; i < last; i++) starts[keys[i] + 1]++;
    for (let key = 0; key < facts.S; key++) starts[key + 1] += starts[key];
    const next = starts.slice(), entries = new Uint32Array(last - first);
    const queries = new Uint32Array(last - first);
    for (let query = 0; query < facts.T; query++) {
      const at = slot * facts.T + query;
      for (let i = this.starts[at]; i < this.starts[at + 1]; i++) {
        const place = next[keys[i]]++;
        entries[place] = i;
        queries[place] = query;
      }
    }
    return { starts, queries, entries };
  }

  // Computes the mean over slots of what `list` gives for each; the strongest first.
  mean(slots, list) {
    const sums = new Map();
    for (const slot of slots) {
      for (const [at, weight] of list(slot)) {
        sums.set(at, (sums.get(at) || 0) + weight / slots.length);
      }
    }
    return [...sums].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  }

  attendsTo(slots, query) { return this.mean(slots, (slot) => this.row(slot, query)); }

  attendedBy(slots, key) { return this.mean(slots, (slot) => this.column(slot, key)); }

  // Gives the weight of one pair in one slot; null if the page does not have it.
  weight(slot, query, key) {
    const at = slot * facts.T + query;
    for (let i = this.starts[at]; i < this.starts[at + 1]; i++) {
      if (this.arrays.keys[i] === key) return this.weightAt(i);
    }
    return facts.complete ? 0 : null;
  }

  // Gives what a key receives, or the entropy of a query, as a mean over slots; or NaN.
  of(name, slots, at) {
    const length = name === "received" ? facts.S : facts.T, { top } = facts[name];
    let sum = 0;
    for (const slot of slots) {
      const code = this.arrays[name][slot * length + at];
      sum += code === 65535 ? NaN : top[slot] * (code / 65280) ** 2;
    }
    return sum / slots.length;
  }

  // Gives the cells of a small picture as shares from 0 to 1, as a mean over slots.
  picture(slots) {
    const [rows, columns] = facts.cells, size = rows * columns;
    const cells = new Float32Array(size);
    for (const slot of slots) {
      for (let i = 0; i < size; i++) {
        const byte = this.arrays.pictures[slot * size + i];
        cells[i] += byte === 255 ? NaN : (byte / 254) ** 2 / slots.length;
      }
    }
    return cells;
  }

  name(slot) {
    const { layer, head } = this.slots[slot];
    const where = facts.heads.length > 1 ? `layer ${layer}, ` : "";
    return where + (head === null ? "mean of all heads" : `head ${head}`);
  }
}

// Says whether there is a text, and not only a number for each head.
const hasText = facts.kind !== "entropy" || facts.T > 1;

const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

// Writes a share for readers: 37 %, 4.2 %, 0.03 %.
function percent(share) {
  if (Number.isNaN(share)) return "not a number";
  const value = 100 * share;
  if (value >= 9.95 || value === 0) return `${Math.round(value)} %`;
  return value >= 0.95 ? `${value.toFixed(1)} %` : value >= 0.005 ? `${value.toFixed(2)} %` : "< 0.01 %";
}

// Writes a number for readers in three digits, or two if it is small or rounded.
function short(number) {
  if (number === null || Number.isNaN(number)) return "not a number";
  const digits = number < 1 || facts.exact === false ? 2 : 3;
  return number >= 99.5 ? String(Math.round(number)) : number.toPrecision(digits);
}

// Says over how many keys a query spreads: so many equal weights have the same entropy.
const spreadOver = (entropy) => `spreads over ${short(Math.exp(entropy))} keys`;
