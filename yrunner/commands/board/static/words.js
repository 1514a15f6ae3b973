// Every sentence of the page, in English and Chinese.

const WORDS = {
  en: {
    skip: "Skip to the content", other: "中文", runs: "Runs", commands: "Commands", compare: "Compare",
    runs_in: "Runs in {0}", no_runs: "No run has been found in {0} yet. Start one under “Commands”.",
    filter: "Filter by name, stage or base", all_states: "All states", none_fit: "No run fits the filter.",
    running: "running", finished: "finished", interrupted: "interrupted", failed: "failed",
    name: "Run", state: "State", base: "Base", progress: "Progress", loss: "Loss", validation: "Validation",
    left: "Time left", changed: "Changed", size: "Size", pick: "Choose {0} to compare",
    compare_two: "Compare the two chosen", choose_two: "Choose two runs to compare them.",
    ago_s: "{0} s ago", ago_m: "{0} min ago", ago_h: "{0} h ago", ago_d: "{0} d ago",
    step_of: "{0} of {1}", train: "training", sort: "Sort", eval: "Evaluation", report: "Report",
    tokens: "Heat map", check: "Check", curves: "Curves", recipe: "Recipe", text: "Score a text",
    answers: "Make rows", rows: "Mend rows", stop: "Stop", resume: "Resume", stopping: "Asked {0} to save and stop.",
    resumed: "Resumed; see “Commands” for what it prints.", stop_sure: "Stop {0}? It saves a checkpoint first.",
    no_metrics: "Nothing has been logged yet.", live: "live", environment: "Environment", exploded: "Why it stopped",
    chart_loss: "Loss (nats per token)", chart_zones: "Zones (share of the targets)",
    chart_gradient: "Gradient by zone (share)", chart_drift: "Distance from the base", chart_lr: "Learning rate",
    chart_memory: "Memory (GiB)", chart_speed: "Targets per second", chart_norm: "Gradient norm",
    chart_accuracy: "Accuracy", chart_entropy: "Entropy (nats)", chart_weight: "Mean weight",
    chart_reward: "Rewards and margins", chart_ratio: "Log ratios", chart_loss_parts: "Losses of the parts",
    chart_other: "Other figures", update: "Update",
    last_figures: "Last figures", differing: "Keys that differ", same_recipe: "The recipes have the same keys and values.",
    key: "Key", kind: "Kind", figure: "Figure", difference: "Difference", not_set: "–", no_result: "No run with this name.",
    start: "Start", command: "Command", overrides: "Overrides, one per line, such as train.learning_rate=1e-5",
    overwrite: "Replace an existing result",
    no_recipes: "There is no recipe in this folder or in recipes/.", started: "Started.", no_jobs: "Nothing has been started from this page yet.",
    exit: "exit code {0}", ended: "ended", output: "Output", nothing_printed: "(nothing printed yet)",
    prompt: "Prompt", answer: "Answer", score: "Score", working: "Working; loading a model may take a minute …",
    coloured_by: "Colour", entropy: "Entropy", weight: "Weight", by_model: "Model", tuned: "tuned", base_model: "base",
    mean_loss: "mean loss {0}", own_answer: "What the models answer themselves", given: "as typed",
    hint_tokens: "Choose a token for its figures, and for what its prediction looked at. Arrow keys move.",
    zone: "Zone", zone_0: "easy", zone_1: "learning", zone_2: "hard", zone_3: "refused",
    expected: "Expected", pattern: "Pattern", looked_at: "Looked at most (last layers, mean of the heads)",
    refused_note: "wavy: refused (weight 0)", confident_note: "underlined: sure and wrong",
    number: "Answers", way: "Method", sample: "sampled", dynamic: "by entropy", temperature: "Temperature", longest: "Max. tokens",
    seed: "Seed", write: "Write answers", cut_off: "cut off", save_row: "Save as a training row", saved: "Saved as row {0} of {1}",
    needs_model: "This run has no result yet; its base answers.", no_models: "A reward model writes no answers.",
    by_score: "Ordered by", keep: "keep", edit: "edit", drop: "drop", was_dropped: "dropped: {0}", more: "Show more",
    num_changes: "{0} changed", write_file: "Write a new file", nothing_changed: "Nothing has been changed yet.",
    mended: "{0} rows written to {1}; what was changed is in {2}. Learn from it with: data.train: - file: {1}",
    not_json: "This is not valid JSON.", lost: "The board does not answer; is yrun board still running?",
    clusters: "Clusters", cluster: "Cluster", rows_of: "Rows", suspicious: "Suspicious", telling: "Words that tell it from the others",
    typical: "Typical row", keep_share: "Keep (%)", keep_of: "Share of cluster {0} to keep, in percent", keep_all: "Share of every cluster to keep, in percent",
    no_cluster: "none", num_shares: "{0} clusters cut",
    clusters_note: "Rows with similar hidden states. Suspicious: share of rows among the most suspicious tenth of the corpus. Of a cluster that is cut, the least suspicious rows stay.",
    picture: "Every row as a point by its hidden states, coloured by cluster",
    rows_total: "{0} rows", raw: "Row as JSON", sandbox: "{0} of {1}",
  },
  zh: {
    skip: "跳到正文", other: "English", runs: "训练", commands: "命令", compare: "对比",
    runs_in: "{0} 中的训练", no_runs: "{0} 中还没有训练。可在“命令”页启动。",
    filter: "按名称、阶段或基座筛选", all_states: "全部状态", none_fit: "没有符合条件的训练。",
    running: "运行中", finished: "已完成", interrupted: "已中断", failed: "失败",
    name: "训练", state: "状态", base: "基座", progress: "进度", loss: "损失", validation: "验证",
    left: "剩余时间", changed: "更新", size: "大小", pick: "选择 {0} 进行对比",
    compare_two: "对比选中的两个", choose_two: "请选择两个训练进行对比。",
    ago_s: "{0} 秒前", ago_m: "{0} 分钟前", ago_h: "{0} 小时前", ago_d: "{0} 天前",
    step_of: "{0} / {1}", train: "训练", sort: "排序", eval: "评测", report: "报告",
    tokens: "热力图", check: "检查", curves: "曲线", recipe: "配方", text: "给文本打分",
    answers: "生成样本", rows: "修改样本", stop: "停止", resume: "继续", stopping: "已请求 {0} 保存并停止。",
    resumed: "已继续，输出见“命令”页。", stop_sure: "停止 {0}？会先保存检查点。",
    no_metrics: "还没有日志。", live: "实时", environment: "环境", exploded: "停止原因",
    chart_loss: "损失（每个 token，nat）", chart_zones: "区间（占目标的比例）",
    chart_gradient: "各区间的梯度（比例）", chart_drift: "与基座的距离", chart_lr: "学习率",
    chart_memory: "内存（GiB）", chart_speed: "每秒目标数", chart_norm: "梯度范数",
    chart_accuracy: "准确率", chart_entropy: "熵（nat）", chart_weight: "平均权重",
    chart_reward: "奖励与间隔", chart_ratio: "对数比", chart_loss_parts: "各部分损失",
    chart_other: "其他指标", update: "更新步",
    last_figures: "最终指标", differing: "不同的键", same_recipe: "两份配方的键和值相同。",
    key: "键", kind: "类型", figure: "指标", difference: "差", not_set: "–", no_result: "没有这个训练。",
    start: "启动", command: "命令", overrides: "覆盖项，每行一个，例如 train.learning_rate=1e-5",
    overwrite: "覆盖已有结果",
    no_recipes: "当前目录和 recipes/ 中没有配方。", started: "已启动。", no_jobs: "还没有从本页启动过命令。",
    exit: "退出码 {0}", ended: "已结束", output: "输出", nothing_printed: "（还没有输出）",
    prompt: "提示", answer: "回答", score: "打分", working: "处理中；加载模型可能需要一分钟……",
    coloured_by: "颜色", entropy: "熵", weight: "权重", by_model: "模型", tuned: "微调后", base_model: "基座",
    mean_loss: "平均损失 {0}", own_answer: "模型自己的回答", given: "输入的回答",
    hint_tokens: "选择一个 token 查看其数值，以及预测它时关注了什么。可用方向键移动。",
    zone: "区间", zone_0: "容易", zone_1: "学习", zone_2: "困难", zone_3: "拒绝",
    expected: "模型预期", pattern: "模式", looked_at: "关注最多（最后几层，各头平均）",
    refused_note: "波浪线：被拒绝（权重 0）", confident_note: "下划线：确信但错误",
    number: "回答数", way: "方式", sample: "采样", dynamic: "按熵", temperature: "温度", longest: "最多 token",
    seed: "随机种子", write: "生成回答", cut_off: "被截断", save_row: "保存为训练样本", saved: "已保存为 {1} 的第 {0} 行",
    needs_model: "该训练还没有结果，由基座回答。", no_models: "奖励模型不生成回答。",
    by_score: "排序依据", keep: "保留", edit: "修改", drop: "删除", was_dropped: "已删除：{0}", more: "显示更多",
    num_changes: "已改 {0} 行", write_file: "写入新文件", nothing_changed: "还没有任何修改。",
    mended: "已将 {0} 行写入 {1}；修改记录在 {2}。用它训练：data.train: - file: {1}",
    not_json: "不是有效的 JSON。", lost: "没有响应；yrun board 还在运行吗？",
    clusters: "聚类", cluster: "聚类", rows_of: "行数", suspicious: "可疑", telling: "区别于其他聚类的词",
    typical: "典型的行", keep_share: "保留（%）", keep_of: "聚类 {0} 保留的百分比", keep_all: "每个聚类保留的百分比",
    no_cluster: "无", num_shares: "缩减 {0} 个聚类",
    clusters_note: "隐藏状态相似的行。“可疑”是属于全体最可疑十分之一的行所占的比例。缩减聚类时保留其中最不可疑的行。",
    picture: "各行按隐藏状态画成的点，颜色表示聚类",
    rows_total: "共 {0} 行", raw: "JSON 原文", sandbox: "{1} 的{0}",
  },
};

const KEY = "yrunner-language";
const known = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
let language = known() ?? (navigator.languages.some((name) => /^zh/i.test(name)) &&
  /^zh/i.test(navigator.language) ? "zh" : "en");

export const locale = () => (language === "zh" ? "zh-CN" : "en");

export function word(name, ...parts) {
  const text = WORDS[language][name] ?? name;
  return text.replace(/\{(\d)\}/g, (_, index) => parts[index]);
}

export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  try { localStorage.setItem(KEY, language); } catch { /* a private window keeps nothing */ }
}

export const languages = WORDS;
