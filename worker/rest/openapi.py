"""The OpenAPI document of the whole API, written down rather than derived.

The routes of inference and health are none of FastAPI's, and the protocol's bodies are read raw; a
document made of FastAPI's own routes would describe neither. A test plays requests made from it.

Source: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/
"""

from collections.abc import Iterable
from typing import Any

from platforms.artifact import Datatype
from platforms.runtimes.base import DTYPES

JsonObject = dict[str, Any]

_TENSOR_PARAMETERS: JsonObject = {
    "type": "object",
    "properties": {"binary_data_size": {"type": "integer", "minimum": 0}},
    "additionalProperties": True,
}
_SHAPE: JsonObject = {"type": "array", "items": {"type": "integer", "minimum": -1}}
_SIZES: JsonObject = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 32}
_TEXT: JsonObject = {"type": "string"}
_COUNT: JsonObject = {"type": "integer", "minimum": 0}
_DATATYPE: JsonObject = {"type": "string", "enum": [kind.value for kind in DTYPES]}

SCHEMAS: JsonObject = {
    "Error": {"type": "object", "required": ["error"], "properties": {"error": _TEXT}},
    "Server": {
        "type": "object",
        "required": ["name", "version", "extensions"],
        "properties": {
            "name": _TEXT,
            "version": _TEXT,
            "extensions": {"type": "array", "items": _TEXT},
        },
    },
    "TensorMetadata": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": _TEXT,
            "datatype": {"type": "string", "enum": [kind.value for kind in Datatype]},
            "shape": _SHAPE,
        },
    },
    "Model": {
        "type": "object",
        "required": ["name", "platform", "inputs", "outputs"],
        "properties": {
            "name": _TEXT,
            "versions": {"type": "array", "items": _TEXT},
            "platform": _TEXT,
            "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/TensorMetadata"}},
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/TensorMetadata"}},
        },
    },
    "ModelConfig": {
        "type": "object",
        "required": ["name", "max_batch_size"],
        "properties": {"name": _TEXT, "max_batch_size": _COUNT},
    },
    "Statistics": {
        "type": "object",
        "required": ["model_stats"],
        "properties": {
            "model_stats": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name", "version", "inference_count", "execution_count"],
                    "properties": {
                        "name": _TEXT,
                        "version": _TEXT,
                        "last_inference": _COUNT,
                        "inference_count": _COUNT,
                        "execution_count": _COUNT,
                        "inference_stats": {"type": "object"},
                        "batch_stats": {"type": "array"},
                    },
                },
            }
        },
    },
    "Index": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": _TEXT,
                "version": _TEXT,
                "state": {"type": "string", "enum": ["READY", "UNAVAILABLE", "LOADING"]},
                "reason": _TEXT,
            },
        },
    },
    "IndexRequest": {"type": "object", "properties": {"ready": {"type": "boolean"}}},
    "RepositoryRequest": {"type": "object", "properties": {"parameters": {"type": "object"}}},
    "InputTensor": {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": _TEXT,
            "shape": _SIZES,
            "datatype": _DATATYPE,
            "parameters": _TENSOR_PARAMETERS,
            "data": {"type": "array", "items": {}},
        },
    },
    "OutputRequest": {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": _TEXT,
            "parameters": {
                "type": "object",
                "properties": {"binary_data": {"type": "boolean"}, "classification": _COUNT},
            },
        },
    },
    "InferenceRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": _TEXT,
            "parameters": {
                "type": "object",
                "properties": {
                    "binary_data_output": {"type": "boolean"},
                    "priority": _COUNT,
                    "timeout": _COUNT,
                },
            },
            "inputs": {
                "type": "array",
                "minItems": 1,
                "items": {"$ref": "#/components/schemas/InputTensor"},
            },
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/OutputRequest"}},
        },
    },
    "InferenceResponse": {
        "type": "object",
        "required": ["model_name", "outputs"],
        "properties": {
            "id": _TEXT,
            "model_name": _TEXT,
            "model_version": _TEXT,
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name", "shape", "datatype"],
                    "properties": {
                        "name": _TEXT,
                        "shape": _SIZES,
                        "datatype": _DATATYPE,
                        "parameters": _TENSOR_PARAMETERS,
                        "data": {"type": "array"},
                    },
                },
            },
        },
    },
    "PredictRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/InputTensor"}},
            "params": {"type": "object"},
        },
    },
    "Prediction": {
        "type": "object",
        "required": ["model", "version", "output"],
        "properties": {"model": _TEXT, "version": _TEXT, "output": {}},
    },
}
_ERRORS = {
    400: "The request is not one of the protocol, or does not fit the model.",
    401: "The token is missing or wrong.",
    403: "A web page of another origin asks.",
    404: "There is no such model or version.",
    408: "The body did not come in time.",
    413: "The body is larger than `http.body_bytes`.",
    500: "The run failed.",
    501: "Something of Triton's that is not offered here.",
    503: "Not now: unloaded, too many requests, or waited too long.",
}
_BINARY = "application/octet-stream"


def _parameter(name: str) -> JsonObject:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _json(schema: str) -> JsonObject:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _operation(
    summary: str, path: str, *, answer: JsonObject | None = None, body: JsonObject | None = None
) -> JsonObject:
    responses: JsonObject = {
        str(status): {"description": text, "content": _json("Error")}
        for status, text in _ERRORS.items()
    }
    responses["200"] = {"description": "Done."}
    if answer is not None:
        responses["200"]["content"] = answer
    operation: JsonObject = {
        "summary": summary,
        "parameters": [_parameter(name) for name in ("model", "version") if f"{{{name}}}" in path],
        "responses": dict(sorted(responses.items())),
    }
    if body is not None:
        operation["requestBody"] = body
    return operation


def _build_model_paths(prefix: str) -> Iterable[tuple[str, JsonObject]]:
    yield prefix, {"get": _operation("Metadata of a model", prefix, answer=_json("Model"))}
    ready = _operation("Whether a model takes requests", prefix)
    yield f"{prefix}/ready", {"get": ready}
    yield (
        f"{prefix}/config",
        {"get": _operation("Configuration of a model", prefix, answer=_json("ModelConfig"))},
    )
    yield (
        f"{prefix}/stats",
        {"get": _operation("Statistics of a model", prefix, answer=_json("Statistics"))},
    )
    infer = _operation(
        "Inference",
        prefix,
        answer={**_json("InferenceResponse"), _BINARY: {"schema": {"type": "string"}}},
        body={"required": True, "content": _json("InferenceRequest")},
    )
    infer["description"] = (
        "Binary tensors follow the JSON, whose length is in the header "
        "Inference-Header-Content-Length; the answer likewise."
    )
    yield f"{prefix}/infer", {"post": infer}


def _build_health(what: str) -> JsonObject:
    return {"get": _operation(f"Whether the server is {what}", "")}


def _build_repository_paths() -> Iterable[tuple[str, JsonObject]]:
    yield (
        "/v2/repository/index",
        {
            "post": _operation(
                "All models and their state",
                "",
                answer=_json("Index"),
                body={"required": False, "content": _json("IndexRequest")},
            )
        },
    )
    for verb in ("load", "unload"):
        path = f"/v2/repository/models/{{model}}/{verb}"
        yield (
            path,
            {
                "post": _operation(
                    f"{verb.capitalize()} a model",
                    path,
                    body={"required": False, "content": _json("RepositoryRequest")},
                )
            },
        )


def _build_predict_paths() -> Iterable[tuple[str, JsonObject]]:
    for prefix in ("/v1/models/{model}", "/v1/models/{model}/versions/{version}"):
        binary = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
        content = {**_json("PredictRequest"), _BINARY: binary, "image/*": binary}
        yield (
            f"{prefix}/predict",
            {
                "post": _operation(
                    "An image or tensors in, labels out",
                    prefix,
                    answer=_json("Prediction"),
                    body={"required": True, "content": content},
                )
            },
        )


def build_openapi(version: str) -> JsonObject:
    """Return the OpenAPI 3.1 document of all routes."""
    paths: JsonObject = {
        "/v2": {"get": _operation("The server", "", answer=_json("Server"))},
        "/v2/health/live": _build_health("alive"),
        "/v2/health/ready": _build_health("ready"),
        "/v2/models/stats": {
            "get": _operation("Statistics of all models", "", answer=_json("Statistics"))
        },
    }
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        paths.update(_build_model_paths(prefix))
    paths.update(_build_repository_paths())
    paths.update(_build_predict_paths())
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Edgeward",
            "version": version,
            "description": "The Open Inference Protocol (V2) and predict.",
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }
