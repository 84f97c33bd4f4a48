// Looks up what memplan worked out; how the numbers go together: memplan/planner/what_if.py.
"use strict";
(() => {
const by = id => document.getElementById(id), get = name => by("what-if-" + name);
const {what_if: grid, plan} = JSON.parse(by("document").textContent);
const tables = {};
for (const [name, {over, type, unit, data}] of Object.entries(grid.tables)) {
  const Numbers = {u1: Uint8Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array}[type];
  const values = new Numbers(Uint8Array.from(atob(data), one => one.charCodeAt(0)).buffer);
  tables[name] = at => unit * values[over.reduce((i, axis) => i * grid.sizes[axis] + at[axis], 0)];
}

// What is at a place.
const look = place => {
  const is = {};
  for (const axis in place) is[axis] = grid.axes[axis][place[axis]];
  const micro = is.micro_batch_size, steps = is.gradient_accumulation_steps, gpus = is.data_parallel_size;
  const at = {...place, several_steps: +(steps > 1), several_gpus: +(gpus > 1),
    in_backward: grid.in_backward[place.optimizer]};
  const of = name => tables[name](at);
  if (of("refused")) return {is, refused: grid.reasons[of("refused") - 1]};
  const tensors = of("resident_bytes") + steps * of("input_bytes") + Math.max(of("passes_bytes"), of("end_bytes"));
  const process = Math.ceil(tensors / grid.segment_bytes) * grid.segment_bytes + grid.beside_bytes;
  const parts = ["parameter_bytes", "gradient_bytes", "optimizer_state_bytes"].map(of);
  parts.push(tensors - parts.reduce((a, b) => a + b), process - tensors);
  const seconds = steps * of("pass_s") + (steps - 1) * of("added_s") + of("update_s");
  const batch = micro * steps * gpus, tokens = batch * is.seq_len * grid.tokens_per_length / seconds;
  const batch_is = `${[micro, steps, gpus].map(count).join(" x ")} = ${count(batch)}`;
  return {is, process, parts, batch, batch_is, rows: [...parts, tensors, process, seconds, tokens]};
};

// As memplan.units writes them.
const fixed = (x, digits, useGrouping = false) => x.toLocaleString("en", {
  minimumFractionDigits: digits, maximumFractionDigits: digits, roundingMode: "halfEven", useGrouping});
const three = x => fixed(x, x < 9.995 ? 2 : x < 99.95 ? 1 : 0);
const count = x => fixed(x, 0, true);
const bytes = x => {
  if (x < 1024) return x + " B";
  for (const [unit, k] of [["KiB", 2 ** 10], ["MiB", 2 ** 20]]) if (three(x / k) < 1024) return three(x / k) + " " + unit;
  return x < 1e4 * 2 ** 30 ? fixed(x / 2 ** 30, 2, true) + " GiB" : three(x / 2 ** 40) + " TiB";
};
const time = x => {
  for (const [unit, k] of [["us", 1e6], ["ms", 1e3]]) if (three(x * k) < 1000) return three(x * k) + " " + unit;
  if (x < 59.95) return three(x) + " s";
  const s = Math.round(x), min = Math.round(x / 60), h = Math.round(x / 3600);
  if (s < 3600) return `${s / 60 | 0} min ${s % 60} s`;
  return min < 1440 ? `${min / 60 | 0} h ${min % 60} min` : `${count(h / 24 | 0)} d ${h % 24} h`;
};
const more = (x, text) => x ? (x > 0 ? "+" : "-") + text(Math.abs(x)) : "0";

const own = look(grid.own), usable = plan.gpu.usable_bytes;
const verdict = ({refused, process}) => {
  if (refused) return "Not possible: " + refused;
  const free = grid.budget_bytes - process;
  return (free < 0 ? "✗ Does not fit: at least " : "✓ Fits at the least: ") + `${bytes(process)} of ${bytes(usable)}, ` +
    (free < 0 ? bytes(-free) + " too much." : `at most ${bytes(free)} free beyond the margin.`);
};
const draw = ({parts, process}) => {
  const share = x => x / Math.max(usable, process) * 100 + "%";
  parts.forEach((part, i) => { get("pile").children[i].style.width = share(part); });
  get("usable").style.left = share(usable);
  get("budget").style.left = share(grid.budget_bytes);
};
const show = () => {
  const place = {...grid.own};
  for (const axis in place) {
    const asked = get(axis);
    if (!asked) continue;
    place[axis] = +asked.value;
    if (asked.type !== "range") continue;
    const text = get(axis + "-said").textContent = asked.dataset.values.split(" ")[asked.value];
    asked.setAttribute("aria-valuetext", text);
  }
  const found = look(place), is = found.is;
  get("verdict").textContent = verdict(found);
  get("answer").className = "answer " + (found.refused ? "" : found.process > grid.budget_bytes ? "not" : "fits");
  get("found").hidden = get("batch").hidden = "refused" in found;
  if (found.refused) return;
  draw(found);
  found.rows.forEach((x, i) => {
    const [, value, change] = get("rows").rows[i].cells, text = i < 7 ? bytes : i < 8 ? time : count;
    value.textContent = text(x);
    change.textContent = more(x - own.rows[i], text);
  });
  get("batch").textContent = "Effective batch: " + found.batch_is +
    (found.batch === own.batch ? ", as at the start." : `; at the start: ${count(own.batch)}.`);
  get("command").textContent = [grid.commands[+(is.lora_rank !== null)], ...Object.entries(grid.flags)
    .filter(([axis]) => is[axis] !== null).map(([axis, flag]) => flag + " " + is[axis])].join(" ");
};
get("form").addEventListener("input", show);
get("form").addEventListener("reset", () => setTimeout(show));
get("all").hidden = false;
show();
})();
