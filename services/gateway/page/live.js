"use strict";
// Everything shown comes from the wire and is set as text, never as markup.
const $ = (id) => document.getElementById(id);
const el = (tag, text, cls) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (cls) e.className = cls; return e; };
const fill = (id, nodes) => $(id).replaceChildren(...nodes);
const clock = (t) => t ? new Date(t).toISOString().slice(11, 23) : "–";
const svg = (tag, attrs, text) => { const e = document.createElementNS("http://www.w3.org/2000/svg", tag); for (const k in attrs) e.setAttribute(k, attrs[k]); if (text !== undefined) e.textContent = text; return e; };

function lamps(j) {
  const box = el("span", undefined, "lamps");
  [...(j.signal.state || "")].forEach((a, i) => { const l = el("i", undefined, /[rygGcux]/.test(a) ? a : ""); l.title = `${(j.groups || [])[i] || i}: ${a}`; box.append(l); });
  return box;
}
function row(cells) { const tr = el("tr"); cells.forEach((c) => { const td = el("td"); if (c instanceof Node) td.append(c); else td.textContent = c; tr.append(td); }); return tr; }

function map(js) {
  if (!js.length) return;
  const xs = js.map((j) => j.lon_e6), ys = js.map((j) => j.lat_e6);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const W = 640, H = 320, pad = 46;
  $("map").setAttribute("viewBox", `0 0 ${W} ${H}`);
  fill("map", js.map((j) => {
    const x = pad + (x1 > x0 ? (j.lon_e6 - x0) / (x1 - x0) : 0.5) * (W - 2 * pad), y = H - pad - (y1 > y0 ? (j.lat_e6 - y0) / (y1 - y0) : 0.5) * (H - 2 * pad);
    const s = j.signal.state || "", colour = j.signal.mode === "tripped" ? "var(--red)" : /[yu]/.test(s) ? "var(--amber)" : /[Gg]/.test(s) ? "var(--green)" : "var(--red)";
    const g = svg("g", {});
    g.append(svg("circle", { cx: x, cy: y, r: Math.min(8 + j.halted / 2, 26), fill: colour, opacity: 0.85 }), svg("text", { x, y: y - 14 - Math.min(j.halted / 2, 18), "text-anchor": "middle" }, j.name || j.id), svg("text", { x, y: y + 4, "text-anchor": "middle", fill: "#fff", style: "fill:#fff" }, j.halted));
    return g;
  }));
}
function show(v) {
  $("district").textContent = v.district;
  const c = v.counts, l = v.latency_ms, ms = (x) => x ? x.toFixed(0) + " ms" : "–";
  fill("figures", [["Frames agreed", c.frames], ["Readings", c.readings], ["Blocks", c.blocks], ["Sealed size", v.sealed.size], ["Sealed at", clock(v.sealed.time)],
    ["Agreed p50 / p99", ms(l.agreed_p50) + " / " + ms(l.agreed_p99)], ["Sealed p50 / p99", ms(l.sealed_p50) + " / " + ms(l.sealed_p99)],
    ["Commands applied", c.applied + " of " + c.commands], ["Refused", c.refused], ["Interlock trips", c.trips]].map(([k, x]) => { const d = el("div"); d.append(el("dt", k), el("dd", x)); return d; }));
  const alarms = v.alarms || [];
  $("alarms").hidden = !alarms.length;
  fill("alarms", alarms.map((a) => el("p", `Alarm of the auditor since ${clock(a.since)} (UTC): ${a.rule}: ${a.detail}`)));
  const js = v.junctions || [];
  map(js);
  fill("junctions", js.map((j) => {
    let link = el("span", "not yet");
    if (j.evidence) { link = el("a", "bundle " + j.evidence); link.href = "/v1/evidence/" + j.evidence; }
    const why = el("span", j.signal.override ? "override " + j.signal.override : j.rule || "–"), tr = row([j.name || j.id, j.stage || "changing", lamps(j), el("span", j.signal.mode || "–", "mode " + (j.signal.mode || "")), j.vehicles, j.halted, why, link]);
    tr.children[6].className = "wrap";
    return tr;
  }));
  const bad = js.flatMap((j) => (j.failed_detectors || []).map((f) => row([j.name || j.id, f.detector, f.rule, f.reason, clock(f.since)])));
  if (bad.length) fill("detectors", bad); else fill("detectors", [row(["none", "", "", "", ""])]);
  const q = Object.entries(v.quarantine || {});
  if (q.length) $("quarantine").textContent = q.sort().map(([r, n]) => r + " " + n).join(", ") + ". Newest: " + v.last_refusal;
  fill("blocks", (v.blocks || []).slice().reverse().map((b) => row([b.height, clock(b.time), b.records, b.size, b.root, (b.votes || []).join(" ")])));
}
const source = new EventSource("/v1/live");
source.onmessage = (e) => { $("link").textContent = "live"; $("link").className = ""; show(JSON.parse(e.data)); };
source.onerror = () => { $("link").textContent = "connection lost, trying again"; $("link").className = "off"; };
