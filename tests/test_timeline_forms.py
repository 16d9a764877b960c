"""Timelines as people have them: read where they mean one thing, refused, or one prompt."""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import suppress

import pytest

from rf_core.prompts import ChunkClock, TimelineError, parse_timeline
from rf_core.ranges import LONGEST_TIMELINE, MAX_LINES

READ = [
    (
        "“0”: “a red circle moves left”,\n“48”: “a blue square moves up”",
        "0f=a red circle moves left / 48f=a blue square moves up",
    ),
    (
        "[00:00–00:05] a red circle moves left\n[00:05–00:10] a blue square moves up\n",
        "0s=a red circle moves left / 5s=a blue square moves up",
    ),
    (
        "0 seconds: a red circle moves left\n5 seconds: a blue square moves up\n",
        "0s=a red circle moves left / 5s=a blue square moves up",
    ),
    ("“0”: “a red circle”,\n“48”: “blue”", "0f=a red circle / 48f=blue"),
    ("‘0’: ‘a panda’s walk’, ‘48’: ‘b’", "0f=a panda’s walk / 48f=b"),
    ("«0»: «a», «48»: «b»", "0f=a / 48f=b"),
    ('"0"： "a"， "48"： "b"', "0f=a / 48f=b"),
    ("{0: 'a', 48: 'it\\'s', }", "0f=a / 48f=it's"),
    ("{'0': \"it's\", '48': 'b'}", "0f=it's / 48f=b"),
    ('{0: "a", 48: "b"}', "0f=a / 48f=b"),
    ('[{"frame": 0, "prompt": "a"}, {"frame": 48, "prompt": "b"}]', "0f=a / 48f=b"),
    ('[{"time": "0s", "prompt": "a"}, {"time": "5s", "prompt": "b"}]', "0s=a / 5s=b"),
    ('{"frame": 0, "prompt": "a"}\n{"frame": 48, "prompt": "b"}', "0f=a / 48f=b"),
    ('{"0s": "a", "5s": "b"}', "0s=a / 5s=b"),
    ("[00:00–00:05] a\n[00:05–00:10] b", "0s=a / 5s=b"),
    ("[00:00—00:05] a\n[00:05—00:10] b", "0s=a / 5s=b"),
    ("[00:00-00:05]: a\n[00:05-00:10]: b", "0s=a / 5s=b"),
    ("[00:00 to 00:05] a\n[00:05 to 00:10] b", "0s=a / 5s=b"),
    ("[0:00~0:05] a\n[0:05~0:10] b", "0s=a / 5s=b"),
    ("0-5s: a\n5-10s: b", "0s=a / 5s=b"),
    ("Shot 1 [0–5s]: a\nShot 2 [5–10s]: b", "0s=a / 5s=b"),
    ("Scene 1: 0-5s - a\nScene 2: 5-10s - b", "0s=a / 5s=b"),
    ("[0s] a\n[5s] b", "0s=a / 5s=b"),
    ("(0s) a\n(5s) b", "0s=a / 5s=b"),
    ("0 seconds: a\n5 seconds: b", "0s=a / 5s=b"),
    ("0 sec: a\n5 sec: b", "0s=a / 5s=b"),
    ("0secs: a\n5secs: b", "0s=a / 5s=b"),
    ("0 min: a\n1 min: b", "0s=a / 60s=b"),
    ("0ms: a\n500ms: b", "0s=a / 0.5s=b"),
    ("frame 0: a\nframe 12: b", "0f=a / 12f=b"),
    ("Frame 0 - a\nFrame 12 - b", "0f=a / 12f=b"),
    ("frames 0-47: a\nframes 48-95: b", "0f=a / 48f=b"),
    ("0s - a\n5s - b", "0s=a / 5s=b"),
    ("0s – a\n5s – b", "0s=a / 5s=b"),
    ("0秒：a\n5秒：b", "0s=a / 5s=b"),
    ("第0秒：a\n第5秒：b", "0s=a / 5s=b"),
    ("０s：a\n５s：b", "0s=a / 5s=b"),
    ("00:00:00: a\n00:00:05: b", "0s=a / 5s=b"),
    (
        "1\n00:00:00,000 --> 00:00:05,000\na\nmore\n\n2\n00:00:05,000 --> 00:00:10,000\nb",
        "0s=a more / 5s=b",
    ),
    (
        "WEBVTT\n\n00:00.000 --> 00:05.000 align:start\na\n\n00:05.000 --> 00:10.000\nb",
        "0s=a / 5s=b",
    ),
    ("- 0s: a\n- 5s: b", "0s=a / 5s=b"),
    ("* 0s: a\n* 5s: b", "0s=a / 5s=b"),
    ("• 0s: a\n• 5s: b", "0s=a / 5s=b"),
    ("1. 0s: a\n2. 5s: b", "0s=a / 5s=b"),
    ("**0s:** a\n**5s:** b", "0s=a / 5s=b"),
    ("**0s**: a\n**5s**: b", "0s=a / 5s=b"),
    ("- **[0:00-0:05]** a\n- **[0:05-0:10]** b", "0s=a / 5s=b"),
    ("| time | prompt |\n|---|---|\n| 0s | a |\n| 5s | b |", "0s=a / 5s=b"),
    ("0s | a\n5s | b", "0s=a / 5s=b"),
    ("0s\ta\n5s\tb", "0s=a / 5s=b"),
    ("0s = a\n5s = b", "0s=a / 5s=b"),
    ("0s → a\n5s → b", "0s=a / 5s=b"),
    ("0s => a\n5s => b", "0s=a / 5s=b"),
    ("0s -> a\n5s -> b", "0s=a / 5s=b"),
    ("@0s: a\n@5s: b", "0s=a / 5s=b"),
    ("t=0s: a\nt=5s: b", "0s=a / 5s=b"),
    ("0s\xa0: a\n5\xa0s: b", "0s=a / 5s=b"),
    ("\u200b0s: a\n\u200b5s: b", "0s=a / 5s=b"),
    ("\ufeff0s: a\r\n5s: b", "0s=a / 5s=b"),
    ("0s: a\n1,5s: b", "0s=a / 1.5s=b"),
    ("0s: a\n1m30s: b", "0s=a / 90s=b"),
    ("0s:\na\n5s:\nb", "0s=a / 5s=b"),
    ("[0s]\na\n[5s]\nb", "0s=a / 5s=b"),
    ("At 0s: a\nAt 5s: b", "0s=a / 5s=b"),
    ("From 0 to 5 seconds: a\nFrom 5 to 10 seconds: b", "0s=a / 5s=b"),
    ("0s: a\u20285s: b", "0s=a / 5s=b"),
    ("```\n0s: a\n5s: b\n```", "0s=a / 5s=b"),
    ('{0s: "a", 5s: "b"}', "0s=a / 5s=b"),
    ("{red|blue} panda", "part 1={red / part 2=blue} panda"),
    ("a | b", "part 1=a / part 2=b"),
    ("[0s] a", "0s=a"),
    ("[00:00–00:05] a", "0s=a"),
    ("0s - a", "0s=a"),
    ("0s–5s: a\n5s–10s: b", "0s=a / 5s=b"),
    ("0s to 5s: a\n5s to 10s: b", "0s=a / 5s=b"),
    ("0 → 5s: a\n5 → 10s: b", "0s=a / 5s=b"),
    ("0s..5s: a\n5s..10s: b", "0s=a / 5s=b"),
    ("0到5秒：a\n5到10秒：b", "0s=a / 5s=b"),
    ("0-5秒：a\n5-10秒：b", "0s=a / 5s=b"),
    ("【0-5秒】a\n【5-10秒】b", "0s=a / 5s=b"),
    ("（0秒）a\n（5秒）b", "0s=a / 5s=b"),
    ("镜头1（0-5秒）：a\n镜头2（5-10秒）：b", "0s=a / 5s=b"),
    ("镜头一（0-5秒）：a\n镜头二（5-10秒）：b", "0s=a / 5s=b"),
    ("Shot 1 (0-5s):\na\nShot 2 (5-10s):\nb", "0s=a / 5s=b"),
    ("**Shot 1 (0-5s):** a\n**Shot 2 (5-10s):** b", "0s=a / 5s=b"),
    ("**Shot 1** (0-5s): a\n**Shot 2** (5-10s): b", "0s=a / 5s=b"),
    ("Shot 1 – 0-5s – a\nShot 2 – 5-10s – b", "0s=a / 5s=b"),
    ("|0s|a|\n|5s|b|", "0s=a / 5s=b"),
    ("0s:a\n5s:b", "0s=a / 5s=b"),
    ("Second 0: a\nSecond 5: b", "0s=a / 5s=b"),
    ("0.0s: a\n5.0s: b", "0s=a / 5s=b"),
    ("0h0m0s: a\n0h0m5s: b", "0s=a / 5s=b"),
    ("0s～5s：a\n5s～10s：b", "0s=a / 5s=b"),
    ("٠s: a\n٥s: b", "0s=a / 5s=b"),
    ("0S: A\n5S: B", "0s=A / 5s=B"),
    ("0s\u2003:\u2003a\n5s: b", "0s=a / 5s=b"),
    ("0s: a\x0b5s: b", "0s=a / 5s=b"),
    ("global： film\n0s： a\n5s： b", "0s=a / 5s=b"),
    ("**global:** film\n0s: a", "0s=a"),
    ("0s: a\n[5s][cut]: b", "0s=a / 5s=b"),
    ("0s: a\n5s【cut】：b", "0s=a / 5s=b"),
    ("0s: a\n5s: [cut] b", "0s=a / 5s=[cut] b"),
    ('{"0": "a",\n"48": "b",}', "0f=a / 48f=b"),
    ("{“0”: “a”, “48”: “b”}", "0f=a / 48f=b"),
    ("0s: |\n  a\n5s: |\n  b", "0s=a / 5s=b"),
    ("'0s': 'a', '5s': 'b'", "0s=a / 5s=b"),
    ("0s='a'\n5s='b'", "0s='a' / 5s='b'"),
    ("<0s> a\n<5s> b", "0s=a / 5s=b"),
    ("[0.0s -> 5.0s] a\n[5.0s -> 10.0s] b", "0s=a / 5s=b"),
    ("[00:00.000 --> 00:05.000] a\n[00:05.000 --> 00:10.000] b", "0s=a / 5s=b"),
    ("- [ ] 0s: a\n- [ ] 5s: b", "0s=a / 5s=b"),
    ("a. 0s: x\nb. 5s: y", "0s=x / 5s=y"),
    ("(1) 0s: x\n(2) 5s: y", "0s=x / 5s=y"),
    ("Step 1 (0s): x\nStep 2 (5s): y", "0s=x / 5s=y"),
    ("Prompt 1 (0-5s): x\nPrompt 2 (5-10s): y", "0s=x / 5s=y"),
    ("[0s]a\n[5s]b", "0s=a / 5s=b"),
    ("{3|4} cats", "part 1={3 / part 2=4} cats"),
    ("{2 cats|3 dogs} play", "part 1={2 cats / part 2=3 dogs} play"),
    ("style: {3|4} cats", "part 1=style: {3 / part 2=4} cats"),
    ("(00:00 - 00:05) a\n(00:05 - 00:10) b", "0s=a / 5s=b"),
    ("00:00–00:05 | a\n00:05–00:10 | b", "0s=a / 5s=b"),
    ("00:00 → a\n00:05 → b", "0s=a / 5s=b"),
    ("Timestamp 00:00: a\nTimestamp 00:05: b", "0s=a / 5s=b"),
    ("0s >> a\n5s >> b", "0s=a / 5s=b"),
    ("0s >>> a", "0s=a"),
    ("0s :: a\n5s :: b", "0s=a / 5s=b"),
    ("0 s : a\n5 s : b", "0s=a / 5s=b"),
    ("0s: a\n5s：b", "0s=a / 5s=b"),
    ("0s: a\n５s: b", "0s=a / 5s=b"),
    ("0s: a\n+5 seconds: b", "0s=a / +5s=b"),
    ("chunk 0: a\nchunk 8: b", "c0=a / c8=b"),
    ("chunks 0-7: a\nchunks 8-15: b", "c0=a / c8=b"),
    ("c0-c7: a\nc8-c15: b", "c0=a / c8=b"),
    ("Shot 1: 0s: a\nShot 2: 5s: b", "0s=a / 5s=b"),
    ("Shot 1 (0-5 seconds): a\nShot 2 (5-10 seconds): b", "0s=a / 5s=b"),
    ("Shot #1 (0:00-0:05) - a\nShot #2 (0:05-0:10) - b", "0s=a / 5s=b"),
    ("Scene 1 | 0-5s | a\nScene 2 | 5-10s | b", "0s=a / 5s=b"),
    ("Shot 1 [0-5s]\na", "0s=a"),
    ("→ 0s: a\n→ 5s: b", "0s=a / 5s=b"),
    ("– 0s: a\n– 5s: b", "0s=a / 5s=b"),
    ("{'0s': 'a', '5s': 'b'}", "0s=a / 5s=b"),
    ('{"00:00": "a", "00:05": "b"}', "0s=a / 5s=b"),
    ("{\"0\": 'a', '48': \"b\"}", "0f=a / 48f=b"),
    ("{„0“: „a“, „48“: „b“}", "0f=a / 48f=b"),
    ("'0' : 'a',\n'48' : 'b',", "0f=a / 48f=b"),
    ('[{"text": "a", "frame": "0"}]', "0f=a"),
    ("[{'frame': 0, 'prompt': 'a'}, {'frame': 48, 'prompt': 'b'},]", "0f=a / 48f=b"),
    ("[{“frame”: 0, “prompt”: “a”}, {“frame”: 48, “prompt”: “b”}]", "0f=a / 48f=b"),
    ('```json\n{"0": "a", "48": "b"}\n```', "0f=a / 48f=b"),
    ('```\n"0": "a",\n"48": "b"\n```', "0f=a / 48f=b"),
    ("0s - a\n5s - b, 7 s pause", "0s=a / 5s=b, 7 s pause"),
]

REFUSED = [
    ("0s a red circle moves left\n5s a blue square moves up\n", 1, 1, "write it as '0s: a prompt'"),
    ('{"prompt":null}\n{"prompt":"a"}\n', 1, 1, "this is not read as a list of entries"),
    ('["a", "b"]', 1, 1, "a list like this has no times"),
    ("['a', 'b']", 1, 1, "a list like this has no times"),
    ('[{"time": 0, "prompt": "a"}, {"time": 5, "prompt": "b"}]', 1, 2, "'0' is no time"),
    ('[[0, "a"], [48, "b"]]', 1, 1, "a list like this has no times"),
    ('"prompt_map": {"0": "a", "16": "b"}', 1, 1, "write the pairs alone, without a name in front"),
    ('{"prompt_map": {"0": "a", "16": "b"}}', 1, 2, "this is not read as JSON"),
    ("0: a\n48: b", 1, 1, "'0' has no unit"),
    ('"0": a\n"48": b', 1, 1, "this is not read as JSON"),
    ("0-5s: a\n6-10s: b", 2, 1, "the range above ends at 5s, but this entry begins at 6s"),
    ("0-5s: a\n4-10s: b", 2, 1, "the range above ends at 5s, but this entry begins at 4s"),
    ("Shot 1 (3s): a\nShot 2 (4s): b", 1, 9, "the first entry is at 3s"),
    ("0s a\n5s b", 1, 1, "write it as '0s: a prompt'"),
    ("0s, a\n5s, b", 1, 1, "write it as '0s: a prompt'"),
    ("0s. a\n5s. b", 1, 1, "write it as '0s: a prompt'"),
    ("00:00:00 a\n00:00:05 b", 1, 1, "write it as '0s: a prompt'"),
    ("time\tprompt\n0s\ta\n5s\tb", 1, 1, "this line has no time and colon in front"),
    ("@0s a\n@5s b", 1, 2, "write it as '0s: a prompt'"),
    ("t=0: a\nt=5: b", 1, 3, "'0' has no unit"),
    ("0s: a\n1,500s: b", 2, 1, "'1,500s' is not a time"),
    ("0s: a\n5m: b", 2, 1, "'5m' has the unknown unit 'm'"),
    ("0s\na\n5s\nb", 1, 1, "write it as '0s: a prompt'"),
    ("At 0s, a\nAt 5s, b", 1, 4, "write it as '0s: a prompt'"),
    (
        "From 0 to 5 seconds: a cat. From 5 to 10 seconds: a dog",
        1,
        39,
        "a second time, '10 seconds:', stands in this line",
    ),
    ("[0s] a [5s] b", 1, 8, "a second time, '[5s]', stands in this line"),
    (
        "[00:00-00:05] a [00:05-00:10] b",
        1,
        17,
        "a second time, '[00:05-00:10]', stands in this line",
    ),
    ("0s: a, 5s: b", 1, 1, "5s: stands inside the prompt"),
    ("0s: a | 5s: b", 1, 1, "5s: stands inside the prompt"),
    ("0-5s: a, 5-10s: b", 1, 12, "a second time, '10s:', stands in this line"),
    ("a (0s)\nb (5s)", 1, 4, "write it as '0s: a prompt'"),
    ("a red circle [0-5s]\nblue [5-10s]", 1, 15, "write it as '0s: a prompt'"),
    ("0,a\n5,b", 1, 1, "'0' has no unit"),
    ("0 a\n5 b", 1, 1, "'0' has no unit"),
    ("[0] a\n[5] b", 1, 2, "'0' has no unit"),
    ("0 Sekunden: a\n5 Sekunden: b", 1, 1, "'0' has no unit"),
    ('"0s: a"\n"5s: b"', 1, 1, "remove the quotes around this line; write it as '0s: a prompt'"),
    ("## 0-5s\na\n## 5-10s\nb", 1, 1, "a line that starts with # is a comment"),
    ("0:00 Intro\n0:45 Verse", 1, 1, "write it as '0s: a prompt'"),
    ("[0-5] a\n[5-10] b", 1, 2, "'0' has no unit"),
    ("0-5: a", 1, 1, "'0' has no unit"),
    ("5s a\n10s b", 1, 1, "write it as '5s: a prompt'"),
    ("Timeline:\n0s a\n5s b", 1, 1, "this line has no time and colon in front"),
    ("- time: 0s\n  prompt: a\n- time: 5s\n  prompt: b", 2, 3, "fields are not read"),
    ("0s: a\n5s b", 2, 1, "write it as '5s: a prompt'"),
    ("[0s a]\n[5s b]", 1, 2, "write it as '0s: a prompt'"),
    ("[0s, cut] a\n[5s, cut] b", 1, 2, "write it as '0s: a prompt'"),
    ('{"red"} panda', 1, 14, "the JSON's { is never closed"),
    ("0-5s a red circle", 1, 1, "write it as '0s: a prompt'"),
    ("[00:05–00:10] a", 1, 2, "the first entry is at 5s"),
    ("0:00-0:05 a red circle\n0:05-0:10 b", 1, 1, "write it as '0s: a prompt'"),
    ("0:00-0:05: a\n0:05-end: b", 2, 1, "write it as '5s: a prompt'"),
    ("0-5s: a\n5s+: b", 2, 1, "write it as '5s: a prompt'"),
    ("Shot 1 (wide, 0-5s): a\nShot 2 (close, 5-10s): b", 1, 15, "write it as '0s: a prompt'"),
    ("0-5s (wide): a\n5-10s (close): b", 1, 1, "write it as '0s: a prompt'"),
    ("0-5s | wide | a\n5-10s | close | b", 1, 1, "this row has not two cells, a time and a prompt"),
    ("| 1 | 0s | a |\n| 2 | 5s | b |", 1, 1, "the entry at part 1 has no prompt"),
    ("0s;a\n5s;b", 1, 1, "write it as '0s: a prompt'"),
    ("time,prompt\n0s,a\n5s,b", 1, 1, "this line has no time and colon in front"),
    ('"time","prompt"\n"0s","a"\n"5s","b"', 1, 1, "this line has no time and colon in front"),
    ("0 s a\n5 s b", 1, 1, "write it as '0s: a prompt'"),
    ("0sec a\n5sec b", 1, 1, "write it as '0s: a prompt'"),
    ("T+0s: a\nT+5s: b", 1, 2, "+0s has no entry before it"),
    ("T0: a\nT5: b", 1, 2, "'0' has no unit"),
    ("+0s: a\n+5s: b", 1, 1, "+0s has no entry before it"),
    ("0.0: a\n5.0: b", 1, 1, "'0.0' has no unit"),
    ("00: a\n05: b", 1, 1, "'00' has no unit"),
    ("0'': a\n5'': b", 1, 1, "'0' has no unit"),
    ('0": a\n5": b', 1, 1, "'0' has no unit"),
    ("0″: a\n5″: b", 1, 1, "'0' has no unit"),
    ("0s [cut]: a\n5s: b", 1, 1, "the first entry has nothing to switch from"),
    ("0s: a\n5s(cut): b", 2, 1, "write it as '5s: a prompt'"),
    ("0s: a\n5s {cut}: b", 2, 1, "write it as '5s: a prompt'"),
    ("0s: a\n5s [cut] b", 2, 4, "the mode is not closed by a bracket and a colon"),
    ("0s: a\n[5s] [cut] b", 2, 6, "the mode is not closed by a bracket and a colon"),
    ("0s: a\n5s, cut: b", 2, 1, "write it as '5s: a prompt'"),
    ("0s: a\n[5s, cut]: b", 2, 2, "write it as '5s: a prompt'"),
    ("0s: a\n5s cut: b", 2, 1, "write it as '5s: a prompt'"),
    ('{"0": "a", "48": "b"', 1, 21, "the JSON's { is never closed"),
    ('{"0": "a" "48": "b"}', 1, 2, "this is not read as JSON"),
    ("{0: a, 48: b}", 1, 2, "this is not read as JSON"),
    ('{"0": ["a"], "48": ["b"]}', 1, 2, "this is not read as JSON"),
    ('{"0": {"prompt": "a"}}', 1, 2, "this is not read as JSON"),
    ('{"prompts": ["a", "b"]}', 1, 2, "this is not read as JSON"),
    (
        '[{"start": "0s", "end": "5s", "prompt": "a"}]',
        1,
        2,
        "an entry has a time and a prompt, and 'end' has no meaning",
    ),
    (
        '[{"prompt": "a", "duration": 5}]',
        1,
        2,
        "an entry has a time and a prompt, and 'duration' has no",
    ),
    ("prompts:\n  - time: 0s\n    prompt: a", 1, 1, "this line has no time and colon in front"),
    ('"0s": "a"\n"5s": "b"', 1, 1, "this is not read as JSON"),
    ("[0.0 -> 5.0] a\n[5.0 -> 10.0] b", 1, 2, "'0.0' has no unit"),
    ("00:00:00:00 a\n00:00:05:00 b", 1, 1, "'00:00:00:00' is not a time"),
    ("#0s a\n#5s b", 1, 1, "there is no prompt"),
    ("//0s: a\n//5s: b", 1, 3, "write it as '0s: a prompt'"),
    ("1: 0s: x\n2: 5s: y", 1, 1, "'1' has no unit"),
    ("Start: a\n5s: b", 1, 1, "this line has no time and colon in front"),
    ("0s: a\nthen at 5s: b", 2, 9, "write it as '5s: a prompt'"),
    ("0s a\n\n5s b", 1, 1, "write it as '0s: a prompt'"),
    ("0s: a\n\n\n5s b", 4, 1, "write it as '5s: a prompt'"),
    ("0s：a；5s：b", 1, 1, "5s: stands inside the prompt"),
    ("0s: a; 5s: b; 10s: c", 1, 1, "5s: stands inside the prompt"),
    ("[0:00] a [0:05] b", 1, 10, "a second time, '[0:05]', stands in this line"),
    ("0:00 a, 0:05 b", 1, 1, "write it as '0s: a prompt'"),
    ("0:00 - a, 0:05 - b", 1, 11, "a second time, '0:05 -', stands in this line"),
    ("0s -> a, 5s -> b", 1, 10, "a second time, '5s ->', stands in this line"),
    ("0s → a → 5s → b", 1, 10, "a second time, '5s >', stands in this line"),
    ("07:30: a quiet office", 1, 1, "the first entry is at 450s"),
    ("8 seconds: the time it takes", 1, 1, "the first entry is at 8s"),
    ("5s: a countdown", 1, 1, "the first entry is at 5s"),
    ("24 frames: the count", 1, 1, "the first entry is at 24f"),
    ("C4: an explosion", 1, 1, "the first entry is at c4"),
    ("“0” : is written", 1, 1, "this is not read as JSON"),
    ("5 minutes later\n10 minutes later", 1, 1, "write it as '300s: a prompt'"),
    ("Create a video:\n[0-5s] a\n[5-10s] b", 1, 1, "this line has no time and colon in front"),
    ("0 секунд: a\n5 секунд: b", 1, 1, "'0' has no unit"),
    ("0 Sek.: a\n5 Sek.: b", 1, 1, "'0' has no unit"),
    ("0秒 a\n5秒 b", 1, 1, "write it as '0s: a prompt'"),
    ("0초: a\n5초: b", 1, 1, "'0' has no unit"),
    ("[0s-5s]: a; [5s-10s]: b", 1, 13, "a second time, '[5s-10s]', stands in this line"),
    ("0s~ a\n5s~ b", 1, 1, "write it as '0s: a prompt'"),
    ("0s) a\n5s) b", 1, 1, "write it as '0s: a prompt'"),
    ("0s/ a\n5s/ b", 1, 1, "write it as '0s: a prompt'"),
    ("0s • a\n5s • b", 1, 1, "write it as '0s: a prompt'"),
    ("0s\u3000a\n5s\u3000b", 1, 1, "write it as '0s: a prompt'"),
    ("0sa\n5sb", 1, 1, "'0sa' has the unknown unit 'sa'"),
    ("0.5s a\n1s b", 1, 1, "write it as '0.5s: a prompt'"),
    ("0s: a\n5 seconds later: b", 2, 1, "write it as '5s: a prompt'"),
    ("0s: a\n5s later: b", 2, 1, "write it as '5s: a prompt'"),
    ("0s: a\nafter 5s: b", 2, 7, "write it as '5s: a prompt'"),
    ("0s: a\n5 seconds in - b", 2, 1, "write it as '5s: a prompt'"),
    ("0s: a\n+ 5s b", 2, 1, "this line has no time and colon in front"),
    ("0s: a\n~5s: b", 2, 2, "write it as '5s: a prompt'"),
    ("0s: a\n5-ish s: b", 2, 1, "this line has no time and colon in front"),
    ("0s: a\n5s-10s b", 2, 1, "write it as '5s: a prompt'"),
    ("0f: a\nf48: b", 2, 2, "'48' has no unit"),
    ("f0: a\nf48: b", 1, 2, "'0' has no unit"),
    ("0f a\n48f b", 1, 1, "write it as '0f: a prompt'"),
    ("frame 0 a\nframe 48 b", 1, 1, "write it as '0f: a prompt'"),
    ("c0 a\nc8 b", 1, 1, "write it as 'c0: a prompt'"),
    ("c0: a\nc8 b", 2, 1, "write it as 'c8: a prompt'"),
    ("#1 0s: a", 1, 1, "there is no prompt"),
    ("Shot 1, 0s-5s, a\nShot 2, 5s-10s, b", 1, 9, "write it as '0s: a prompt'"),
    ("[Shot 1, 0-5s] a\n[Shot 2, 5-10s] b", 1, 10, "write it as '0s: a prompt'"),
    ("[Shot 1: 0-5s] a\n[Shot 2: 5-10s] b", 1, 10, "write it as '0s: a prompt'"),
    ("[Shot 1] (0-5s) a\n[Shot 2] (5-10s) b", 1, 11, "write it as '0s: a prompt'"),
    ("Shot One (0-5s): a\nShot Two (5-10s): b", 1, 11, "write it as '0s: a prompt'"),
    ("Opening (0-5s): a\nMiddle (5-10s): b", 1, 10, "write it as '0s: a prompt'"),
    ("Opening shot [0s-5s]: a\nNext [5s-10s]: b", 1, 15, "write it as '0s: a prompt'"),
    ("🎬 0-5s: a\n🎬 5-10s: b", 1, 3, "write it as '0s: a prompt'"),
    ("⏱ 0s: a\n⏱ 5s: b", 1, 3, "write it as '0s: a prompt'"),
    ("» 0s: a", 1, 1, "remove the quotes around this line; write it as '0s: a prompt'"),
    ("0s:  \n5s: b", 1, 1, "the entry at 0s has no prompt"),
    ('{"0-5s": "a", "5-10s": "b"}', 1, 2, "the key '0-5s' is not a video frame"),
    ('{"0": "a", "48": "b",,}', 1, 22, "this is not read as JSON"),
    ('"0": "a"; "48": "b"', 1, 1, "this is not read as JSON"),
    ('"0": "a"\n"48": "b"', 1, 1, "this is not read as JSON"),
    ('"0"="a", "48"="b"', 1, 1, "this is not read as JSON"),
    ('"0"->"a"', 1, 1, "this is not read as JSON"),
    ('{"0":"a"}{"48":"b"}', 1, 2, "this is not read as JSON"),
    ('{"0":"a"}\n{"48":"b"}', 1, 2, "this is not read as JSON"),
    ('[{"0":"a"},{"48":"b"}]', 1, 1, "a list like this has no times"),
    ('[{"t":0,"p":"a"}]', 1, 2, "an entry has a time and a prompt, and 'p' has no meaning here"),
    ('[\n  "0s: a",\n  "5s: b"\n]', 1, 1, "a list like this has no times"),
    ('["0s", "a", "5s", "b"]', 1, 1, "a list like this has no times"),
    ('[("0s", "a"), ("5s", "b")]', 1, 1, "a list like this has no times"),
    ('// comment\n"0": "a"', 1, 1, "this line has no time and colon in front"),
    ('timeline = {"0": "a"}', 1, 1, "write the pairs alone, without a name in front"),
    ('prompts = {0: "a", 48: "b"}', 1, 1, "write the pairs alone, without a name in front"),
    ('const p = {"0": "a"}', 1, 1, "write the pairs alone, without a name in front"),
    ("<0s>a</0s><5s>b</5s>", 1, 11, "a second time, '<5s>', stands in this line"),
    ("100m: a sprint", 1, 1, "'100m' has the unknown unit 'm'"),
    ("4K: a city", 1, 1, "'4K' has the unknown unit 'k'"),
    ("35mm: a city", 1, 1, "'35mm' has the unknown unit 'mm'"),
    ("10am: a city", 1, 1, "'10am' has the unknown unit 'am'"),
    ("1st: a winner", 1, 1, "'1st' has the unknown unit 'st'"),
    ("007: james bond", 1, 1, "'007' has no unit"),
    ("0s a red circle moves left, 5s a blue square moves up", 1, 1, "write it as '0s: a prompt'"),
]

PROMPTS = [
    "红色的圆 🔴 moves left\na blue square\n",
    'id\tprompt\n1\t"hello world\n2\ta red circle\n',
    "prompt,source\r\na red circle moves left,x\r\n",
    "a clock at 8:15",
    "a 5 s countdown",
    "16:9 video of a panda",
    "9:16 vertical video",
    "[9:16] vertical video",
    "(9:16) vertical video",
    "A cat walks from 0 to 5 seconds. Then it sits.",
    "3 cats",
    "3 cats: one black",
    "2 seconds of calm",
    "2 seconds of calm\n3 seconds of storm",
    "1920s street",
    "[1920s] street",
    "80s neon\n90s rave",
    "0s and 1s falling like rain",
    "[wide shot] a panda",
    "(masterpiece:1.2), panda",
    "shot 1 of a film",
    "Shot 1: a\nShot 2: b",
    "1. a\n2. b",
    "1) 3 cats\n2) 5 dogs",
    "5 seconds left on the clock",
    "24 frames per second film",
    "2024-05-01: a protest",
    "8:15pm: a city",
    "At 8:15 the train leaves",
    "“hello” says the panda",
    "[“wide”] a panda",
    "100% cotton",
    "50mm lens, f1.8: bokeh",
    "4k - a panda",
    "3d render of a cat\n8k detail",
    "007 runs",
    "a panda\nat 0:05 a cat",
    "Seconds pass: a flower",
    "in the 1920s: a street",
    "12:30 - lunch at a diner",
    "time 5 pm",
    "0.5x slow motion",
    "- a panda\n- a cat",
    "0s a red circle",
    "5 s - a countdown",
    "(5s) a clip",
    "(0:05) a",
    "0'00\": a\n0'05\": b",
    '("0": "a", "48": "b")',
    "first 5 seconds: a\nnext 5 seconds: b",
    "a scoreboard that reads 0:00, then 0:05",
    "9:00 am, a quiet office",
    "9:00 – a quiet office",
    "24fps film look: a cat",
    "3-4 people walking",
    "2 to 3 people: a crowd",
    "0% battery on a phone",
    "0 gravity astronaut",
    "0-60 mph in 3 s, sports car",
    "1:1 square, a cat",
    "4:3 - a tv show",
    "50/50 split",
    "10 seconds later: the cat",
    "[1] a cat [2] a dog",
    "(0) zero",
    "1-bit art",
    '"5 seconds" written on a sign',
    "'90s grunge",
    "‘80s neon",
    "- 3 cats\n- 5 dogs",
    "1. 3 cats\n2. 5 dogs",
    "0. intro\n1. verse",
    "Act 1, a stage",
    "Scene 12. The house",
    "Part 2: the return",
    "Take 5: jazz band",
    "f/1.8, 85mm: portrait",
    "ISO 100, 1/250s: portrait",
    "at 5 o'clock: tea",
    "from 3 angles: a car",
    "t-shirt: red",
    "time 4: a clock",
    "A countdown: 5s, 4s, 3s",
    "lasts 5s: a spin",
    "At 0:30, the drop",
    "Frame 12 of a comic",
    "c4 explosive",
    '"a sign: 0s"',
    "8k, 4k - detail",
    "360° view: a room",
    "3 s of silence: rain",
    "T-5s: launch",
    '"0" is written on a wall',
    "[{red}] cat",
    '["neo" noir], city',
    "2 cats, 2 dogs\n3 cats, 3 dogs",
    "1 cat\n2 dogs\n3 birds",
    "10s of birds\n20s of cats",
    "1s and 0s",
    "0s_ a",
    '"0" "a", "48" "b"',
    "0s {a} 5s {b}",
    "[a:b:0.5] panda",
    "[cat:dog:10] on grass",
    "a cat AND a dog",
    "(a cat:1.3) [b]",
    "a:b:c",
    "5 o'clock shadow: a man",
    "1.85:1 aspect",
    "2x4 lumber",
    "3 - 2 - 1 countdown",
    "3, 2, 1, go",
    "10... 9... 8...",
    "0, 1, 2, 3 on a board",
    "00:00 on a bomb timer",
    "a bomb timer at 0:05\na bomb timer at 0:04",
    "The time is 12:00\nThe time is 12:05",
    "0:00",
    "5 s",
    "00s hip hop fashion",
    "0 to 100 in 5 seconds",
    '"0-5" score board',
    "0–0 draw, football match",
    "1-0 win: fans cheer",
    "2-1: fans cheer",
    "4-4-2: formation",
    "50-50: split screen",
    "9-5: an office",
    "24/7: a shop",
    "2.39:1 - a city",
    "5th element: movie",
    "7-Eleven: night",
    "'0:00' on a clock",
    "[00:05] on a clock",
    "(30s) woman walking",
    "[30 seconds] of rain",
    "(24 frames) animation",
    "-5s countdown",
    "+1 - a meme",
    "t = 0 physics diagram",
    "@5s user",
    "time 0:00 begins",
    "from 0:00 to 0:05 a cat",
    "From 0s to 5s, a cat walks; from 5s to 10s, it sits",
    "0s. Then 1s.",
    "0s-5s of calm",
    "0s, 1s and 2s falling",
    "A cat walks from 0 to 5 seconds. Then, from 5 to 10 seconds, it sits.",
    "1. a panda\n2. a cat\n3. a dog",
]

# What ComfyUI's choices in braces leave of JSON.
READ += [("0: 'a', 48: 'b'", "0f=a / 48f=b"), ('0: "a",\n48: "b",', "0f=a / 48f=b")]
REFUSED += [
    ('["frame": 0, "prompt": "a", "frame": 48, "prompt": "b"]', 1, 1, "the braces around these"),
    ('"time": "0s", "prompt": "a"', 1, 1, "the braces around these entries are missing"),
]


def entries_of(text: str) -> str:
    return " / ".join(f"{entry.time}={entry.text}" for entry in parse_timeline(text).entries)


@pytest.mark.parametrize(("text", "entries"), READ)
def test_what_can_mean_one_timeline_alone_is_read_as_that(text: str, entries: str) -> None:
    assert entries_of(text) == entries
    timeline = parse_timeline(text)
    assert parse_timeline(timeline.to_text()) == timeline


@pytest.mark.parametrize(("text", "line", "column", "problem"), REFUSED)
def test_what_is_nearly_a_timeline_is_refused_where_it_is_not(
    text: str, line: int, column: int, problem: str
) -> None:
    with pytest.raises(TimelineError) as caught:
        parse_timeline(text)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert problem in caught.value.problem


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_that_merely_contains_times_stays_one_prompt(prompt: str) -> None:
    assert entries_of(prompt) == f"0s={' '.join(prompt.split())}"
    timeline = parse_timeline(prompt)
    assert parse_timeline(timeline.to_text()) == timeline


@pytest.mark.parametrize(
    "text",
    [
        text
        for text, _, _, problem in REFUSED
        if "\n" not in text.strip() and "stands inside the prompt" not in problem
    ],
)
def test_a_time_and_a_colon_in_front_make_one_prompt_of_a_refused_line(text: str) -> None:
    assert entries_of(f"0s: {text}") == f"0s={text}"


@pytest.mark.parametrize(("text", "entries"), READ)
def test_line_ends_and_a_byte_order_mark_change_nothing(text: str, entries: str) -> None:
    assert entries_of("\ufeff" + text.replace("\r\n", "\n").replace("\n", "\r\n")) == entries


def test_other_forms_start_in_the_chunks_of_the_language_s_own() -> None:
    own = parse_timeline("0s: a\n5s: b\n1:04.5 [cut]: c").resolve(ChunkClock())
    for text in (
        "[0:00–0:05] a\n[0:05-1:04,5] b\n[64.5s–70s] [cut]: c",
        "- **0 seconds:** a\n- **5 sec:** b\n- **1m4.5s [cut]:** c",
    ):
        assert parse_timeline(text).resolve(ChunkClock()) == own


def test_a_range_is_refused_that_counts_from_another_entry_or_ends_before_it_begins() -> None:
    for text, column, problem in (
        ("0s: a\n+2-5s: b", 1, "a range counts from the start, in one unit"),
        ("0s: a\n5s-c9: b", 1, "a range counts from the start, in one unit"),
        ("0s: a\n5-2s: b", 3, "this range ends at 2s, before it has begun"),
    ):
        with pytest.raises(TimelineError) as caught:
            parse_timeline(text)
        assert (caught.value.line, caught.value.column) == (2, column)
        assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("one", "most", "of"),
    [
        ("x", LONGEST_TIMELINE, "characters"),
        ("0s: x\n", MAX_LINES, "lines"),
        ("\u2028", MAX_LINES, "lines"),
        ("x|", MAX_LINES - 1, "parts"),
        ('"0": "a",', MAX_LINES, "entries"),
    ],
)
def test_text_longer_than_a_timeline_can_be_is_refused_in_a_sentence(one, most, of) -> None:
    with suppress(TimelineError):
        parse_timeline(one * most)
    with pytest.raises(TimelineError, match=f"at most .*{of}|{of}; a timeline has at most"):
        parse_timeline(one * (most + 1))


def test_some_hundred_prompts_of_eight_hundred_characters_are_read() -> None:
    prompts = [f"{8 * number}s: {'a panda walks in fog, ' * 36}" for number in range(370)]
    assert len(parse_timeline("\n".join(prompts)).entries) == 370


MARKS = """
    0s 5s 8s 1.5s 0 5 12 0:05 00:00 00:05 00:00:05,000 c4 96f ５秒 秒 第 ms min 1m30s : ： - – -->
    → => = | ｜ ~ [ ] ( ) { } 【 】 " ' “ ” ‘ ’ « » , ， . + @ t= At From WEBVTT ** * # ## global:
    [cut] [cut]: [0-5s] (0s) prompt time frame "0": "a" panda 雪 🐼 of ` --- 0-5s: 5-10s: ``` 80s
    1920s 16:9 e ٣ ² ½
"""
PIECES = [*MARKS.split(), "\\", "\u200b", "\u00a0", "\ufeff", "\u2028", "\x00"]
PIECES += [
    "frame 12",
    "0 seconds",
    " - ",
    " to ",
    "Shot 1",
    "- ",
    "1. ",
    "# ",
    "[blend 3]:",
    "0s: a\n",
]
PIECES += ['{"frame": 0, "prompt": "a"}', "\n5s: b", "\n", "\n", "\n", "\r\n", "\t", " ", "  "]


def fuzz(seed: int, cases: int) -> Counter[str]:
    """How many of `cases` random texts were read, and how many refused; all else fails."""
    rng, counts = random.Random(seed), Counter[str]()
    for _ in range(cases):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 16)))
        about = f"seed {seed}: {text!r}"
        try:
            timeline = parse_timeline(text)
        except TimelineError as error:
            counts["refused"] += 1
            lines = text.removeprefix("\ufeff").splitlines() or [""]
            assert 1 <= error.line <= len(lines), about
            assert 1 <= error.column <= len(lines[error.line - 1]) + 1, about
        else:
            counts["read"] += 1
            assert timeline.entries and all(entry.text for entry in timeline.entries), about
            assert parse_timeline(timeline.to_text()) == timeline, about
    return counts


def test_random_pieces_of_timelines_are_read_and_written_back_or_refused() -> None:
    counts = fuzz(seed=15, cases=3000)
    assert min(counts["read"], counts["refused"]) > 300


HOSTILE = [
    *(
        "0\n",
        "0s\n",
        "1 ",
        "1:",
        "- ",
        "1. ",
        "*",
        '"',
        "'",
        "[",
        "[0s ",
        "0.",
        "0,",
        "0-",
        "|",
        "x|",
    ),
    *(
        "雪",
        "🐼\u200d",
        "第0秒雪\n",
        "\u200b",
        "\t",
        "[0-5s] ",
        "0s - ",
        "5s :",
        "# 0s\n",
        "--> ",
        "line:0 ",
    ),
    *("global ", "{'0': '", "{'0': 'a',", "“0”: “a”,", '[{"frame": 0, "prompt": "a"},', "\\"),
]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "0s: a\n", "[0s] ", "{'0': '", "00:00 --> 00:05 "])
@pytest.mark.parametrize("piece", HOSTILE)
def test_the_longest_text_of_anything_takes_no_time(piece: str, before: str) -> None:
    text = before + piece * ((LONGEST_TIMELINE - 20) // len(piece))
    start = time.process_time()
    try:
        parse_timeline(text)
    except TimelineError as error:
        assert error.line >= 1
    assert time.process_time() - start < 0.6  # 0.13 at most where it was written
