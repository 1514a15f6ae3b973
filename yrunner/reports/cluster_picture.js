// A corpus as a picture: every row is a point, placed by its hidden states, coloured by its cluster.
// No module, so that the sort page can hold it inline; the board serves the same file.

// Neighbouring numbers have colours that lie far apart; rows in no cluster are grey.
const clusterColour = (number) => (number ? `hsl(${(number * 137.5) % 360} 62% 48%)` : "#8888");

// `points` begin with x and y. Rows that are not strong are drawn first and pale.
function drawClusters(canvas, points, clusterOf, isStrong = () => true) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!points.length || !width) return;
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  const pen = canvas.getContext("2d");
  pen.scale(devicePixelRatio, devicePixelRatio);
  const ends = [0, 1].map((axis) => {
    const values = points.map((point) => point[axis]);
    // Not Math.min(...values): a large corpus has more points than a call takes arguments.
    const low = values.reduce((least, value) => Math.min(least, value), Infinity);
    const high = values.reduce((most, value) => Math.max(most, value), -Infinity);
    return [low, high - low || 1];
  });
  const edge = 14;
  const share = (point, axis) => (point[axis] - ends[axis][0]) / ends[axis][1];
  const size = points.length > 5000 ? 1.6 : 3;
  for (const strong of [false, true]) {
    pen.globalAlpha = strong ? 0.85 : 0.15;
    points.forEach((point, row) => {
      if (isStrong(row) !== strong) return;
      pen.fillStyle = clusterColour(clusterOf(row));
      pen.beginPath();
      pen.arc(edge + share(point, 0) * (width - 2 * edge),
        height - edge - share(point, 1) * (height - 2 * edge), size, 0, 2 * Math.PI);
      pen.fill();
    });
  }
}
