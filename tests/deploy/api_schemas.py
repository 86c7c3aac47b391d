"""JSON schemas for kubeconform out of Kubernetes' OpenAPI document and the definitions of custom resources: strict ones, in which
a field that the API does not have is an error."""

import json

from manifests import documents

# What Kubernetes' documents call a string and its decoder takes as a number too.
NUMBER_OR_STRING = {"oneOf": [{"type": "string"}, {"type": "number"}]}
QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"


def strict(schema):
    """A copy in which objects with named properties take no others, in the words that JSON Schema has."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return NUMBER_OR_STRING
    result = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            result[key] = {name: strict(child) for name, child in value.items()}
        elif key in ("items", "additionalProperties", "not"):
            result[key] = strict(value)
        elif key in ("allOf", "anyOf", "oneOf"):
            result[key] = [strict(child) for child in value]
        elif key not in ("description", "format", "default") and not key.startswith("x-kubernetes"):
            result[key] = value
    if "properties" in result and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def file_name(group, version, kind):
    """As kubeconform's {{.ResourceKind}}{{.KindSuffix}}."""
    return "-".join(word for word in (kind, group.split(".")[0], version) if word).lower() + ".json"


def references(schema):
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str):
                yield value.rsplit("/", 1)[-1]
            else:
                yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def builtin(swagger):
    """(file name, schema) of every kind of Kubernetes itself."""
    definitions = {name: strict(schema) for name, schema in swagger["definitions"].items()}
    definitions[QUANTITY] = NUMBER_OR_STRING
    for name, schema in swagger["definitions"].items():
        kinds = schema.get("x-kubernetes-group-version-kind", [])
        if len(kinds) != 1:  # DeleteOptions and the like belong to every group
            continue
        needed, waiting = {}, [name]
        while waiting:
            current = waiting.pop()
            if current not in needed:
                needed[current] = definitions[current]
                waiting += references(definitions[current])
        yield (file_name(kinds[0]["group"], kinds[0]["version"], kinds[0]["kind"]),
               {"$ref": f"#/definitions/{name}", "definitions": needed})


def custom(definition):
    """(file name, schema) of every version of a custom resource."""
    spec = definition["spec"]
    for version in spec["versions"]:
        yield (file_name(spec["group"], version["name"], spec["names"]["kind"]),
               strict(version["schema"]["openAPIV3Schema"]))


def write(apis, folder):
    """Schemas of all kinds in `apis` (make_tools.sh) into `folder`."""
    schemas = dict(builtin(json.loads((apis / "swagger.json").read_text())))
    for path in sorted(apis.glob("*.yaml")):
        for definition in documents(path.read_text()):
            schemas.update(custom(definition))
    for name, schema in schemas.items():
        (folder / name).write_text(json.dumps(schema))
