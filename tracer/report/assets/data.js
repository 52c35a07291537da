"use strict";
// The data of the page: arrays from base64, names of labels, numbers as text. Only the data element is read from the
// document. Everything shown is set as text, never as HTML.

const DATA = JSON.parse(document.getElementById("report-data").textContent);

function unpack(text, type) {
  const raw = atob(text || "");
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return new type(bytes.buffer);
}

// A column of names: each name once, and a code for each example.
class Names {
  constructor(packed) {
    this.names = packed ? packed.names : [];
    this.codes = packed ? unpack(packed.codes, Int32Array) : new Int32Array(0);
  }
  get present() { return this.codes.length > 0; }
  at(place) { return this.present ? this.names[this.codes[place]] : ""; }
}

// Return the place of each name in alphabetical order, in which numbers within names count by their value.
function ranksOf(names) {
  const collate = new Intl.Collator("en", { numeric: true });
  const rank = new Int32Array(names.length);
  names.map((_, code) => code).sort((a, b) => collate.compare(names[a], names[b])).forEach((code, place) => { rank[code] = place; });
  return rank;
}

// The ids of examples by index; those that are paths of files are links.
class Ids {
  constructor(packed) {
    this.place = new Map(packed ? Array.from(unpack(packed.indices, Int32Array), (index, place) => [index, place]) : []);
    this.packed = packed;
    this.linked = unpack(packed && packed.linked, Uint8Array);
  }
  get present() { return this.place.size > 0; }
  text(index) { return this.place.has(index) ? this.packed.names[this.place.get(index)] : ""; }
  show(index) {
    const name = this.text(index);
    if (!name) return null;
    if (!this.linked[this.place.get(index)]) return make("span", { class: "id", title: name }, name);
    const path = name.replace(/\\/g, "/");
    const root = path.startsWith("/") ? "file://" : /^[A-Za-z]:/.test(path) ? "file:///" : `${encodeURI(this.packed.base)}/`;
    return make("a", { class: "id", title: name, href: root + path.split("/").map(encodeURIComponent).join("/") }, name);
  }
}

const TABLE = {
  indices: unpack(DATA.indices, Int32Array),
  columns: DATA.columns.map((column) => ({ ...column, values: unpack(column.values, Float32Array) })),
  labels: new Names(DATA.labels),
  predictions: new Names(DATA.predictions),
  suggested: new Names(DATA.suggested),
  flags: Object.fromEntries(Object.entries(DATA.flags).map(([name, mask]) => [name, unpack(mask, Uint8Array)])),
};
TABLE.place = new Map(Array.from(TABLE.indices, (index, place) => [index, place]));

const TRAIN_IDS = new Ids(DATA.ids);
const TARGET_IDS = new Ids(DATA.target_ids);

const TARGETS = {
  indices: unpack(DATA.targets.indices, Int32Array),
  labels: new Names(DATA.targets.labels),
  predictions: new Names(DATA.targets.predictions),
  mean: DATA.targets.mean && unpack(DATA.targets.mean, Float32Array),
  ends: ["proponents", "opponents"].map((name) => ({
    name,
    k: DATA.targets[name].k,
    indices: unpack(DATA.targets[name].indices, Int32Array),
    scores: unpack(DATA.targets[name].scores, Float32Array),
  })),
};

// Labels of proponents and opponents that are not in the table.
const OUTSIDE = { place: new Map(), labels: new Names(null) };
if (DATA.targets.train_labels) {
  unpack(DATA.targets.train_labels.indices, Int32Array).forEach((index, place) => OUTSIDE.place.set(index, place));
  OUTSIDE.labels = new Names(DATA.targets.train_labels.labels);
}

function labelOf(index) {
  const place = TABLE.place.get(index);
  return place === undefined ? OUTSIDE.labels.at(OUTSIDE.place.get(index)) : TABLE.labels.at(place);
}

function flagOf(name, index) {
  const place = TABLE.place.get(index);
  return Boolean(place !== undefined && TABLE.flags[name] && TABLE.flags[name][place]);
}

function number(value, signed) {
  const size = Math.abs(value);
  let text = size >= 1e6 || (size !== 0 && size < 1e-3) ? value.toExponential(2) : size >= 1000
    ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
  if (signed && value > 0) text = `+${text}`;
  return text.replace(/-/g, "\u2212");
}

function count(value) { return value.toLocaleString("en"); }

// Make an element: attributes by name, `class` included; children are elements or text.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}
