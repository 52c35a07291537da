"use strict";
// What the page holds: arrays from base64, names of labels, numbers as text. Nothing here touches the document but to
// read the data element; everything shown is set as text, never as HTML.

const DATA = JSON.parse(document.getElementById("report-data").textContent);

function unpack(text, type) {
  const raw = atob(text || "");
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return new type(bytes.buffer);
}

// A column of names: one code a row, and the names once.
class Names {
  constructor(packed) {
    this.names = packed ? packed.names : [];
    this.codes = packed ? unpack(packed.codes, Int32Array) : new Int32Array(0);
  }
  get present() { return this.codes.length > 0; }
  at(place) { return this.present ? this.names[this.codes[place]] : ""; }
}

const TABLE = {
  rows: unpack(DATA.rows, Int32Array),
  columns: DATA.columns.map((column) => ({ ...column, values: unpack(column.values, Float32Array) })),
  labels: new Names(DATA.labels),
  predictions: new Names(DATA.predictions),
  suggested: new Names(DATA.suggested),
  flags: Object.fromEntries(Object.entries(DATA.flags).map(([name, mask]) => [name, unpack(mask, Uint8Array)])),
};
TABLE.place = new Map(Array.from(TABLE.rows, (row, place) => [row, place]));

const TARGETS = {
  ids: unpack(DATA.targets.ids, Int32Array),
  labels: new Names(DATA.targets.labels),
  predictions: new Names(DATA.targets.predictions),
  mean: DATA.targets.mean && unpack(DATA.targets.mean, Float32Array),
  ends: ["proponents", "opponents"].map((name) => ({
    name,
    k: DATA.targets[name].k,
    rows: unpack(DATA.targets[name].rows, Int32Array),
    scores: unpack(DATA.targets[name].scores, Float32Array),
  })),
};

const OTHERS = { place: new Map(), labels: new Names(null) };
if (DATA.targets.row_labels) {
  unpack(DATA.targets.row_labels.rows, Int32Array).forEach((row, place) => OTHERS.place.set(row, place));
  OTHERS.labels = new Names(DATA.targets.row_labels.labels);
}

function labelOf(row) {
  const place = TABLE.place.get(row);
  return place === undefined ? OTHERS.labels.at(OTHERS.place.get(row)) : TABLE.labels.at(place);
}

function flagOf(name, row) {
  const place = TABLE.place.get(row);
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
