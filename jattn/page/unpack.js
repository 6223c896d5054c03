"use strict";
// The facts of the page, and its numbers: planes of bytes, deflated, in base 64.

const facts = JSON.parse(document.getElementById("facts").textContent);
const byId = (name) => document.getElementById(name);

// Makes an element of a kind, with properties and children. Text is never read as HTML.
function make(kind, properties = {}, ...inside) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...inside);
  return element;
}

async function inflated(letters) {
  const text = atob(letters), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Makes an array from its planes: the lowest bytes of all numbers, the second bytes, ….
function joined(bytes, [start, length, planes]) {
  if (planes === 1) return bytes.subarray(start, start + length);
  const array = planes === 2 ? new Uint16Array(length) : new Uint32Array(length);
  for (let plane = 0; plane < planes; plane++) {
    const from = start + plane * length, shift = 8 * plane;
    for (let i = 0; i < length; i++) array[i] |= bytes[from + i] << shift;
  }
  return array;
}

async function unpacked() {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser is too old for this page: it has no DecompressionStream.");
  }
  const bytes = await inflated(byId("numbers").textContent);
  byId("numbers").remove(); // frees up to ten megabytes, which are not needed again
  const named = Object.entries(facts.arrays).map(([name, at]) => [name, joined(bytes, at)]);
  return Object.fromEntries(named);
}

// Starts a page; if that fails, the page shows the error.
async function start(run) {
  byId("title").textContent = facts.title;
  try {
    run(await unpacked());
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    byId("about").textContent = String(error.message || error);
    throw error;
  }
}

// Makes a group of buttons with one of them on: one tab stop, then arrow keys.
function choice(group, names, onChoice) {
  const buttons = Object.entries(names).map(([value, label]) =>
    make("button", { type: "button", role: "radio", textContent: label, value }));
  const choose = (button) => {
    for (const other of buttons) {
      other.setAttribute("aria-checked", String(other === button));
      other.tabIndex = other === button ? 0 : -1;
    }
    onChoice(button.value);
  };
  group.replaceChildren(...buttons);
  group.hidden = buttons.length < 2;
  group.addEventListener("click", (event) => {
    if (event.target.value) choose(event.target);
  });
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = (buttons.indexOf(event.target) + step + buttons.length) % buttons.length;
    buttons[at].focus();
    choose(buttons[at]);
  });
  return (value) => choose(buttons.find((button) => button.value === value) || buttons[0]);
}
