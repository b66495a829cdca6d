"""Writes longbench.jsonl: what LongBench's metrics give for predictions that are easy to get wrong.

The metrics are stated here from their definitions, on the packages that the published scorer uses (its
requirements.txt): rouge 1.0.1, fuzzywuzzy 0.18.0 without python-Levenshtein, jieba 0.42.1. No test runs this file; to write
the values again: pip install rouge==1.0.1 fuzzywuzzy==0.18.0 jieba==0.42.1 && python3 tests/vectors/longbench.py
"""

import json
import logging
import pathlib
import re
import string
from collections import Counter

import jieba
from fuzzywuzzy import fuzz
from rouge import Rouge

jieba.setLogLevel(logging.ERROR)
ZH = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."


def overlap(found, expected):
    same = (Counter(found) & Counter(expected)).total()
    if same == 0:
        return 0.0
    p, r = same / len(found), same / len(expected)
    return 2 * p * r / (p + r)


def without(text, marks):
    return "".join(c for c in text.lower() if c not in marks)


def qa_f1(pred, truth, _):
    def plain(text):
        return re.sub(r"\b(?:a|an|the)\b", " ", without(text, string.punctuation)).split()

    return overlap(plain(pred), plain(truth))


def qa_f1_zh(pred, truth, _):
    def plain(text):
        words = ("".join(without(w, string.punctuation + ZH).split()) for w in jieba.cut(text))
        return [w for w in words if w]

    return overlap(plain(pred), plain(truth))


def rouge_l(pred, truth, _):
    try:
        return Rouge().get_scores([pred], [truth], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):  # no sentence; the published scorer takes any exception for 0
        return 0.0


def rouge_l_zh(pred, truth, _):
    return rouge_l(" ".join(jieba.cut(pred)), " ".join(jieba.cut(truth)), None)


def classification(pred, truth, classes):
    found = [c for c in classes if c in pred]
    for name in found:  # the list shrinks while it is walked, as in the published scorer
        if name != truth and name in truth:
            found.remove(name)
    return 1 / len(found) if truth in found else 0.0


def numbers(pred, right):
    found = re.findall(r"\d+", pred)
    return found.count(right) / len(found) if found else 0.0


def code(pred, truth, _):
    lines = pred.lstrip("\n").split("\n")
    line = next((l for l in lines if "`" not in l and "#" not in l and "//" not in l), "")
    return fuzz.ratio(line, truth) / 100


METRICS = {
    "hotpotqa": qa_f1,
    "multifieldqa_zh": qa_f1_zh,
    "qmsum": rouge_l,
    "vcsum": rouge_l_zh,
    "trec": classification,
    "passage_retrieval_en": lambda p, t, _: numbers(p, re.findall(r"Paragraph (\d+)", t)[0]),
    "passage_retrieval_zh": lambda p, t, _: numbers(p, re.findall(r"段落(\d+)", t)[0]),
    "passage_count": lambda p, t, _: numbers(p, t),
    "lcc": code,
}
CLASSES = ["Food", "Animal", "Event", "Invention, book and other creative piece", "book", "Other", "Other location"]
LONG = "self.assertEqual(response.status_code, expected.status_code, msg=response.content.decode('utf-8')) "
CASES = [
    ("hotpotqa", "The  Eiffel-Tower, in Paris!", ["Eiffel Tower (Paris)"]),
    ("hotpotqa", "", ["Paris"]),
    ("hotpotqa", "the", ["an a the"]),
    ("hotpotqa", "a—the theme of an anthem", ["theme anthem", "THEME"]),
    ("hotpotqa", "İstanbul ΣΊΣΥΦΟΣ\x1cÉcole\u00a0naïve", ["i̇stanbul σίσυφος école naïve"]),
    ("hotpotqa", "yes yes yes no", ["yes no no"]),
    ("multifieldqa_zh", "北京大学计算机科学与技术系。", ["北京大学，计算机系"]),
    ("multifieldqa_zh", "", ["是"]),
    ("multifieldqa_zh", "《红楼梦》的作者是曹雪芹", ["《红楼梦》 曹雪芹"]),
    ("multifieldqa_zh", "GPT-4 v1.2.3在2024年达到了98.5%", ["gpt 4 的 v1.2 在2024年达到98.5%"]),
    ("multifieldqa_zh", "㐀龥鿖 B超和T恤　卡拉OK\r\n１２", ["龥 B超 T恤 卡拉OK １２"]),
    ("qmsum", "The cat sat. The dog ran. The end", ["A cat sat. The dog ran away. "]),
    ("qmsum", "...", ["a. b"]),
    ("qmsum", " ", ["a. b. "]),
    ("qmsum", "a", ["..."]),
    ("qmsum", "x y z x y", ["y x z y x. z"]),
    ("qmsum", "to be or not to be", ["not to be. to be or", "be to not or be to"]),
    ("vcsum", "会议讨论了2023年的预算。大家同意增加3.5%的投入", ["会议就预算达成一致，投入增加3.5%。"]),
    ("vcsum", "", ["会议"]),
    ("vcsum", "Shift-Lock键 e.g. user_name", ["按Shift Lock键"]),
    ("trec", "Food", ["Food"]),
    ("trec", "Food Animal", ["Food"]),
    ("trec", "Invention, book and other creative piece", ["Invention, book and other creative piece"]),
    ("trec", "Other location", ["Other location"]),
    ("trec", "Other", ["Other location"]),
    ("trec", "book or Other Other location", ["Other location"]),
    ("trec", "\n\nFood\nAnimal", ["Food"]),
    ("trec", "none", ["Food"]),
    ("trec", "", ["Food"]),
    ("passage_retrieval_en", "Paragraph 7, or 17", ["Paragraph 7"]),
    ("passage_retrieval_en", "seven", ["Paragraph 7"]),
    ("passage_retrieval_en", "07", ["Paragraph 7"]),
    ("passage_retrieval_zh", "段落12和１２", ["段落12"]),
    ("passage_retrieval_zh", "", ["段落12"]),
    ("passage_count", "3 or ², then 3", ["3"]),
    ("passage_count", "", ["3"]),
    ("lcc", "\n\n    return x\n}", ["    return x"]),
    ("lcc", "# note\n`x`\n// y\nint a = b;", ["int a = c;"]),
    ("lcc", "# note", ["x"]),
    ("lcc", "", [""]),
    ("lcc", "ab", ["abcdef"]),
    ("lcc", "abxcd", ["abcd"]),
    ("lcc", "naïve = “é”", ["naive = \"e\""]),
    ("lcc", LONG * 2, [LONG * 3]),
    ("lcc", "    " + LONG.swapcase() * 3, [LONG * 3]),
]


def main():
    cases = []
    for task, pred, answers in CASES:
        classes = CLASSES if task == "trec" else None
        line = pred.lstrip("\n").split("\n")[0] if task == "trec" else pred
        score = max(METRICS[task](line, answer, classes) for answer in answers)
        cases.append({"task": task, "pred": pred, "answers": answers, "all_classes": classes, "score": score})
    path = pathlib.Path(__file__).with_name("longbench.jsonl")
    path.write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in cases), encoding="utf-8")


if __name__ == "__main__":
    main()
