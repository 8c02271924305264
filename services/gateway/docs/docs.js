// Lists the methods of the contract and calls them. Everything is put into the
// page as text, never as markup.
"use strict";

const el = (tag, attrs = {}, ...children) => {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) e[k] = v;
  e.append(...children);
  return e;
};

const name = ref => ref.split("/").pop();

// fieldsOf lists the fields of a schema, one level deep, with what is in lists.
function fieldsOf(doc, schema) {
  const def = schema && schema.$ref ? doc.definitions[name(schema.$ref)] : schema;
  return Object.entries((def && def.properties) || {}).map(([field, p]) => {
    const inner = p.$ref || (p.items && p.items.$ref);
    const type = (p.type === "array" ? "list of " : "") + (inner ? name(inner) : (p.items || p).format || (p.items || p).type || "");
    return [field, type, p.title || p.description || ""];
  });
}

function table(head, rows) {
  const t = el("table", {}, el("tr", {}, ...head.map(h => el("th", { textContent: h }))));
  for (const r of rows) t.append(el("tr", {}, ...r.map(c => el("td", {}, c instanceof Node ? c : String(c)))));
  return t;
}

// example makes an object with every field of a schema empty.
function example(doc, schema, depth = 0) {
  if (!schema || depth > 4) return null;
  if (schema.$ref) return example(doc, doc.definitions[name(schema.$ref)], depth + 1);
  switch (schema.type) {
    case "object": return Object.fromEntries(Object.entries(schema.properties || {}).filter(([, p]) => !p.readOnly).map(([k, p]) => [k, example(doc, p, depth + 1)]));
    case "array": return [];
    case "boolean": return false;
    case "integer": case "number": return 0;
    case "string": return schema.format === "date-time" ? new Date().toISOString() : schema.enum ? schema.enum[0] : "";
  }
  return null;
}

function headers() {
  const who = new FormData(document.getElementById("who"));
  const h = { Accept: "application/json" };
  if (who.get("token")) h.Authorization = "Bearer " + who.get("token");
  if (who.get("purpose")) h["Stopline-Purpose"] = who.get("purpose");
  if (who.get("case")) h["Stopline-Case"] = who.get("case");
  if (who.get("basis")) h["Stopline-Legal-Basis"] = who.get("basis");
  return h;
}

async function call(verb, path, op, inputs, body, out, stop) {
  let url = path;
  const query = new URLSearchParams();
  for (const p of op.parameters || []) {
    const v = inputs[p.name] ? inputs[p.name].value : "";
    if (p.in === "path") url = url.replace("{" + p.name + "}", encodeURIComponent(v));
    else if (p.in === "query" && v !== "") for (const x of p.type === "array" ? v.split(",") : [v]) query.append(p.name, x);
  }
  if ([...query].length) url += "?" + query;
  const h = headers();
  if (body) h["Content-Type"] = "application/json";
  out.textContent = verb + " " + url + "\n";
  try {
    const res = await fetch(url, { method: verb, headers: h, body: body ? body.value : undefined, signal: stop.signal, credentials: "omit" });
    out.textContent += res.status + " " + res.statusText + "\n";
    for (const k of ["content-type", "stopline-access-receipt", "retry-after"]) if (res.headers.get(k)) out.textContent += k + ": " + res.headers.get(k) + "\n";
    out.textContent += "\n";
    if ((res.headers.get("content-type") || "").includes("zip")) { out.textContent += (await res.blob()).size + " bytes"; return; }
    if (!(res.headers.get("content-type") || "").includes("ndjson")) {
      const text = await res.text();
      try { out.textContent += JSON.stringify(JSON.parse(text), null, 2); } catch { out.textContent += text; }
      return;
    }
    const reader = res.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      out.textContent = (out.textContent + value).slice(-20000);
    }
  } catch (e) {
    out.textContent += "\n" + e;
  }
}

function method(doc, verb, path, op) {
  const inputs = {};
  const rows = [];
  let bodyParam = null;
  for (const p of op.parameters || []) {
    if (p.in === "body") { bodyParam = p; continue; }
    inputs[p.name] = el("input", { placeholder: p.type === "array" ? "a,b" : p.format || p.type || "" });
    rows.push([p.name, inputs[p.name], p.description || ""]);
  }
  const out = el("pre", { hidden: true });
  const box = el("details", {}, el("summary", {}, el("span", { className: "verb", textContent: verb }), el("code", { textContent: path }), " " + (op.summary || "")));
  let made = false;
  box.addEventListener("toggle", () => {
    if (made) return;
    made = true;
    if (op.description) box.append(el("p", { textContent: op.description }));
    if (rows.length) box.append(table(["parameter", "", ""], rows));
    let body = null;
    if (bodyParam) {
      body = el("textarea", { value: JSON.stringify(example(doc, bodyParam.schema), null, 2) });
      box.append(table(["field", "type", ""], fieldsOf(doc, bodyParam.schema)), body);
    }
    const ok = (op.responses && op.responses["200"] && op.responses["200"].schema) || {};
    const answer = ok.properties && ok.properties.result ? ok.properties.result : ok;
    const answers = fieldsOf(doc, answer);
    let stop = new AbortController();
    const go = el("button", { type: "button", textContent: "Call" });
    const end = el("button", { type: "button", textContent: "Stop" });
    go.addEventListener("click", () => { stop.abort(); stop = new AbortController(); out.hidden = false; call(verb, path, op, inputs, body, out, stop); });
    end.addEventListener("click", () => stop.abort());
    box.append(el("p", {}, go, " ", end), out);
    if (answers.length) box.append(el("p", { textContent: "Answers with" }), table(["field", "type", ""], answers));
  });
  return box;
}

(async () => {
  const main = document.getElementById("methods");
  let doc;
  try {
    doc = await (await fetch("/openapi.json")).json();
  } catch (e) {
    main.textContent = "The contract cannot be read: " + e;
    return;
  }
  main.textContent = "";
  const groups = new Map();
  for (const [path, verbs] of Object.entries(doc.paths)) for (const [verb, op] of Object.entries(verbs)) {
    const tag = (op.tags || ["API"])[0];
    if (!groups.has(tag)) groups.set(tag, []);
    groups.get(tag).push(method(doc, verb.toUpperCase(), path, op));
  }
  for (const [tag, boxes] of groups) {
    const about = (doc.tags || []).find(t => t.name === tag);
    main.append(el("section", {}, el("h2", { textContent: tag }), el("p", { textContent: (about && about.description) || "" }), ...boxes));
  }
  document.getElementById("find").addEventListener("input", e => {
    const want = e.target.value.toLowerCase();
    for (const d of main.querySelectorAll("details")) d.hidden = !d.textContent.toLowerCase().includes(want);
  });
  document.getElementById("who").addEventListener("submit", e => e.preventDefault());
})();
