// The picture of a mask that can be moved and zoomed, and the pair under the pointer in words.

const MOST_PAIRS = 2 ** 20; // drawn one by one in a frame; of more, their blocks
const LARGEST = 48; // pixels of a pair at the closest

start((arrays) => {
  const pairs = new Pairs(arrays), canvas = byId("pairs"), paint = canvas.getContext("2d");
  // `scale`: pixels of a pair; `left`, `top`: the key and the query at the corner.
  const view = { scale: 1, left: 0, top: 0, at: null };
  let colours = {}, blocks = null, width = 0, height = 0, ratio = 1, isAsked = false;

  const smallest = () => Math.min(width / facts.S, height / facts.T);
  const within = (x, low, high) => Math.min(Math.max(x, low), high);

  function settle() {
    view.scale = within(view.scale, smallest(), Math.max(LARGEST, smallest()));
    // What is smaller than the window is in its middle.
    const settled = (from, length, room) => {
      const seen = room / view.scale;
      return seen >= length ? (length - seen) / 2 : within(from, 0, length - seen);
    };
    view.left = settled(view.left, facts.S, width);
    view.top = settled(view.top, facts.T, height);
    if (!isAsked) requestAnimationFrame(draw);
    isAsked = true;
  }

  function zoom(factor, x = width / 2, y = height / 2) {
    const [key, query] = [view.left + x / view.scale, view.top + y / view.scale];
    view.scale = within(view.scale * factor, smallest(), Math.max(LARGEST, smallest()));
    view.left = key - x / view.scale;
    view.top = query - y / view.scale;
    settle();
  }

  function draw() {
    isAsked = false;
    const { scale, left, top } = view;
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint.clearRect(0, 0, width, height);
    const [s, t] = [Math.floor(Math.max(left, 0)), Math.floor(Math.max(top, 0))];
    const [S, T] = [Math.min(facts.S, Math.ceil(left + width / scale)), Math.min(facts.T, Math.ceil(top + height / scale))];
    const x = (key) => (key - left) * scale, y = (query) => (query - top) * scale;
    if ((S - s) * (T - t) <= MOST_PAIRS) {
      paint.imageSmoothingEnabled = scale < 1;
      paint.drawImage(pairs.pairsPicture(t, s, T - t, S - s, colours), x(s), y(t), (S - s) * scale, (T - t) * scale);
    } else {
      // The picture of blocks ends where the last block would.
      paint.imageSmoothingEnabled = scale * pairs.columns < 1;
      paint.save();
      paint.beginPath();
      paint.rect(x(0), y(0), facts.S * scale, facts.T * scale);
      paint.clip();
      paint.drawImage(blocks, x(0), y(0), pairs.across * pairs.columns * scale, pairs.down * pairs.rows * scale);
      paint.restore();
    }
    if (scale >= 9) rule(1, 1, "--paper", 1);
    if (scale * Math.min(pairs.rows, pairs.columns) >= 12) rule(pairs.rows, pairs.columns, "--paper", 2);
    drawCursor(x, y);
    labels(x, y);
  }

  // Lines between pairs, or between blocks.
  function rule(rows, columns, name, thick) {
    const { scale, left, top } = view;
    paint.fillStyle = `rgb(${colours.paper.join(" ")})`;
    for (let s = Math.max(Math.ceil(left / columns), 1) * columns; s < Math.min(left + width / scale, facts.S); s += columns) {
      paint.fillRect((s - left) * scale - thick / 2, Math.max(-top * scale, 0), thick, facts.T * scale);
    }
    for (let t = Math.max(Math.ceil(top / rows), 1) * rows; t < Math.min(top + height / scale, facts.T); t += rows) {
      paint.fillRect(Math.max(-left * scale, 0), (t - top) * scale - thick / 2, facts.S * scale, thick);
    }
  }

  function drawCursor(x, y) {
    if (!view.at) return;
    const [query, key] = view.at, size = Math.max(view.scale, 5);
    paint.strokeStyle = `rgb(${colours.ring.join(" ")})`;
    paint.lineWidth = 2;
    paint.strokeRect(x(key) - 1, y(query) - 1, size + 2, size + 2);
  }

  // Names along the sides, where a pair is as high as a letter.
  function labels(x, y) {
    if (view.scale < 15 || !facts.tokens) return;
    paint.font = "12px system-ui, sans-serif";
    paint.textBaseline = "middle";
    const write = (text, place, turned) => {
      paint.save();
      paint.translate(...place);
      if (turned) paint.rotate(-Math.PI / 2);
      const wide = Math.min(paint.measureText(text).width, 90);
      paint.fillStyle = `rgb(${colours.paper.join(" ")} / 0.85)`;
      paint.fillRect(-3, -8, wide + 6, 16);
      paint.fillStyle = `rgb(${colours.ink.join(" ")})`;
      paint.fillText(text, 0, 0, 90);
      paint.restore();
    };
    const middle = view.scale / 2, [top, left] = [Math.max(view.top, 0), Math.max(view.left, 0)];
    for (let t = Math.floor(top); t < Math.min(facts.T, top + height / view.scale); t++) {
      write(name("query", t), [Math.max(x(0), 0) + 6, y(t) + middle], false);
    }
    for (let s = Math.floor(left) + 1; s < Math.min(facts.S, left + width / view.scale); s++) {
      write(name("key", s), [x(s) + middle, Math.min(y(facts.T), height) - 6], true);
    }
  }

  function name(kind, at) {
    const words = kind === "key" && facts.key_tokens ? facts.key_tokens : facts.tokens;
    return words ? `${at} ${words[at]}` : String(at);
  }

  function read() {
    if (!view.at) {
      byId("read").textContent = "Point at a pair, or go to it with the arrow keys.";
      return;
    }
    const [query, key] = view.at, allowed = pairs.allows(query, key);
    const may = allowed === null ? "perhaps may attend" : allowed ? "may attend" : "may not attend";
    const kind = ["is empty: it is skipped", "is partial: the mask is asked", "is full: no mask is needed"][pairs.kind(query, key)];
    const block = `${Math.floor(query / pairs.rows)}, ${Math.floor(key / pairs.columns)}`;
    byId("read").textContent = `Query ${name("query", query)} ${may} to key ${name("key", key)}. Block ${block} ${kind}.`;
  }

  function point(x, y) {
    const [key, query] = [Math.floor(view.left + x / view.scale), Math.floor(view.top + y / view.scale)];
    const isInside = key >= 0 && query >= 0 && key < facts.S && query < facts.T;
    view.at = isInside ? [query, key] : null;
    read();
    settle();
  }

  const places = new Map(); // of the fingers or the mouse, while they press
  const local = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    places.set(event.pointerId, local(event));
    point(...local(event));
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, (event) => places.delete(event.pointerId));
  }
  canvas.addEventListener("pointermove", (event) => {
    const here = local(event), before = places.get(event.pointerId);
    if (!before) return point(...here);
    const others = [...places].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    places.set(event.pointerId, here);
    if (others.length) { // two fingers: what is between them stays between them
      const [x, y] = others[0], apart = ([u, v]) => Math.hypot(u - x, v - y) || 1;
      return zoom(apart(here) / apart(before), (here[0] + x) / 2, (here[1] + y) / 2);
    }
    view.left -= (here[0] - before[0]) / view.scale;
    view.top -= (here[1] - before[1]) / view.scale;
    return settle();
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), ...local(event));
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(3, ...local(event)));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key in steps) {
      const [down, right] = steps[event.key], [query, key] = view.at || [-down, -right];
      const [rows, columns] = event.shiftKey ? facts.block : [1, 1];
      view.at = [within(query + down * rows, 0, facts.T - 1), within(key + right * columns, 0, facts.S - 1)];
      follow();
      read();
    } else if (event.key === "+" || event.key === "=") zoom(1.5, ...cursor());
    else if (event.key === "-") zoom(1 / 1.5, ...cursor());
    else if (event.key === "0") whole();
    else return;
    event.preventDefault();
  });

  const cursor = () => view.at
    ? [(view.at[1] + 0.5 - view.left) * view.scale, (view.at[0] + 0.5 - view.top) * view.scale]
    : [width / 2, height / 2];

  // Moves the window so that the pair at the cursor is in it.
  function follow() {
    const [query, key] = view.at, [seenKeys, seenQueries] = [width / view.scale, height / view.scale];
    view.left = within(view.left, key + 2 - seenKeys, key - 1);
    view.top = within(view.top, query + 2 - seenQueries, query - 1);
    settle();
  }

  function whole() {
    view.scale = smallest();
    settle();
  }

  function recolour() {
    const names = ["paper", "ink", "ring", "empty", "partial", "full", "some", "gap"];
    colours = Object.fromEntries(names.map((name) => [name, colourOf(name)]));
    blocks = pairs.blocksPicture(colours);
    settle();
  }

  function resize() {
    const isWhole = view.scale <= smallest() * 1.001 || !width;
    width = canvas.clientWidth;
    height = canvas.clientHeight;
    ratio = devicePixelRatio || 1;
    Object.assign(canvas, { width: width * ratio, height: height * ratio });
    if (isWhole) whole(); else settle();
  }

  const why = facts.why ? ` · single pairs are not all here: ${facts.why}` : "";
  const [rows, columns] = facts.block;
  byId("about").textContent = `${facts.T} queries × ${facts.S} keys in blocks of ${rows} × ${columns}: ${facts.shares.join(", ")}${why}`;
  const entry = (name, text) => {
    const dot = make("span", { className: "dot square" });
    dot.style.background = `var(--${name})`;
    return make("li", {}, dot, text);
  };
  byId("legend").append(entry("full", "full block"), entry("partial", "partial block"),
    entry("some", "pair in it that may attend"), entry("gap", "pair in it that may not"), entry("empty", "empty block"));
  byId("closer").addEventListener("click", () => zoom(2, ...cursor()));
  byId("farther").addEventListener("click", () => zoom(0.5, ...cursor()));
  byId("whole").addEventListener("click", whole);
  startTheme(recolour);
  resize();
  read();
  new ResizeObserver(resize).observe(canvas);
});
