"""What easy_vqa.yaml calls."""

from PIL import Image


def doc_to_visual(doc: dict) -> list[Image.Image]:
    return [Image.open(doc["image"]).convert("RGB")]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return {"exact": float(results[0].strip() == doc["answer"])}
