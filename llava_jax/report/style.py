"""How a run's report looks, on paper, on a phone and in the dark."""

STYLE = """
:root {
  --paper: #fbfbf9; --card: #fff; --ink: #1d2226; --soft: #5c666e; --rule: #dfe2e0;
  --accent: #1f5fa8; --good: #1a7043; --bad: #b3312c;
  --t0: #1f5fa8; --t1: #d97a1d; --t2: #3d8f5a; --t3: #b0413e; --t4: #8f979d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e6e8e9; --soft: #9aa4ab; --rule: #30363b;
    --accent: #74aef0; --good: #6fce97; --bad: #f2857f;
    --t0: #74aef0; --t1: #f0a35a; --t2: #7fce9b; --t3: #ee8a86; --t4: #8a939a;
  }
}
* { box-sizing: border-box; margin: 0; }
body {
  background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 19px; font-weight: 650; margin-bottom: 16px; }
h3 { font-size: 15px; font-weight: 600; }
h3 small { font-size: 13px; font-weight: 400; color: var(--soft); }
section { margin-top: 44px; padding-top: 22px; border-top: 1px solid var(--rule); }
section h3 { margin-top: 24px; }
p { margin: 0 0 10px; max-width: 74ch; }
.kind { font-size: 13px; color: var(--soft); margin-bottom: 2px; }
.status { margin-top: 6px; color: var(--soft); }
.status strong { color: var(--ink); font-weight: 600; }
.note, figcaption, .nothing { font-size: 13px; color: var(--soft); }
.progress { height: 4px; border-radius: 2px; background: var(--rule); overflow: hidden; }
.progress i { display: block; height: 100%; background: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 24px 20px; margin-top: 28px; }
.tiles dt { font-size: 13px; color: var(--soft); }
.tiles dd { font-size: 25px; line-height: 1.3; font-weight: 600; letter-spacing: -.01em; }
.tiles dd.note { font-size: 13px; font-weight: 400; letter-spacing: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr));
  gap: 32px 28px; }
figure { min-width: 0; }
figure h3 { margin: 0 0 6px; }
figure .nothing { padding: 26px 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round;
  stroke-linecap: round; }
.band { fill: var(--accent); opacity: .2; }
circle { fill: var(--accent); }
.mark { fill: var(--bad); }
.table { overflow-x: auto; margin-bottom: 14px; }
table { border-collapse: collapse; font-size: 14px; }
caption { text-align: left; font-size: 13px; color: var(--soft); padding-bottom: 6px; }
th, td { text-align: left; vertical-align: top; padding: 5px 24px 5px 0;
  border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: 0; }
th { font-weight: 500; color: var(--soft); }
td { overflow-wrap: anywhere; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.total td { font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr));
  gap: 18px; margin-top: 12px; align-items: start; }
article { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  overflow: hidden; min-width: 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 2px; min-height: 120px; background: var(--paper);
  border-bottom: 1px solid var(--rule); }
.pictures img { flex: 1 1 40%; min-width: 0; height: 170px; object-fit: contain; }
.pictures img:not(:only-child) { height: 120px; }
.pictures p { margin: auto; padding: 8px; }
.question { padding: 12px 14px 0; margin: 0 0 8px; font-weight: 600; overflow-wrap: anywhere;
  white-space: pre-line; max-height: 15em; overflow-y: auto; }
article dl { padding: 0 14px 14px; }
article dl div { padding-top: 6px; margin-top: 6px; border-top: 1px solid var(--rule); }
article dt { font-size: 13px; color: var(--soft); display: flex; justify-content: space-between;
  gap: 8px; }
article dd { overflow-wrap: anywhere; white-space: pre-line; }
article b { font-weight: 600; white-space: nowrap; }
.right { color: var(--good); }
.wrong { color: var(--bad); }
.bars { max-width: 720px; }
.bars p { font-size: 14px; margin: 12px 0 4px; display: flex; justify-content: space-between;
  max-width: none; gap: 12px; }
.bars span { color: var(--soft); font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 22px; border-radius: 4px; overflow: hidden; background: var(--rule); }
.bar i { min-width: 1px; }
.bar .reserve { margin-left: auto; }
.bars + .table { margin-top: 20px; }
.t0 { background: var(--t0); } .t1 { background: var(--t1); } .t2 { background: var(--t2); }
.t3 { background: var(--t3); } .t4 { background: var(--t4); } .measured { background: var(--ink); }
.reserve { background: repeating-linear-gradient(135deg, var(--soft) 0 1px, transparent 1px 5px); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 8px; }
details { margin-top: 6px; }
summary { cursor: pointer; font-weight: 500; padding: 3px 0; }
.fields { width: 100%; }
.fields .fields tr:last-child > * { border-bottom: 0; }
.fields th { width: 260px; overflow-wrap: anywhere; }
.fields details > .table { margin: 0 0 0 14px; }
@media (max-width: 560px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 25px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 18px 16px; }
  .tiles dd { font-size: 21px; }
  th, td { padding-right: 12px; }
  th.n { white-space: normal; }
  .fields th { width: 48%; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, article { break-inside: avoid; }
}
"""
