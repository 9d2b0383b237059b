// Lays out the graphs of tests/pipelines/page.py as Kubeflow's page does, and prints their widths in pixels.
const dagre = require("dagre");
const { drawn, layers } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const widths = {};
for (const [name, { digest, kinds, edges }] of Object.entries(layers)) {
  const graph = new dagre.graphlib.Graph();
  graph.setDefaultEdgeLabel(() => ({}));
  graph.setGraph({ rankdir: "TB" });
  for (const id of Object.keys(kinds)) graph.setNode(id, { width: 224, height: 48 });
  for (const [from, to] of edges) graph.setEdge(from, to);
  dagre.layout(graph);
  const left = graph.nodes().map((id) => graph.node(id).x - 112);
  const right = graph.nodes().map((id) => graph.node(id).x - 112 + drawn[kinds[id]]);
  widths[name] = { digest, width: Math.round(Math.max(...right) - Math.min(...left)) };
}
console.log(JSON.stringify(widths, null, 2));
