#!/usr/bin/env python3
"""Plants violations in a small tree and sees each check find them."""

import pathlib
import subprocess
import tempfile
import unittest

import check_layers
import check_orphans
import check_words

TREE = {
    "tests/lint/layers.txt": "# who may include whom\nbase:\ntensor:\nimage: tensor model_proto\nkernels: tensor\nrpc: image api_proto\n",
    "tests/CMakeLists.txt": "tern_test(NAME image_test SRCS image/image_test.cc)\n",
    "tests/image/image_test.cc": '#include "server/image/image.h"\n#include "grpcpp/grpcpp.h"\n',
    "server/base/base.h": "#include <vector>\n",
    "server/base/CMakeLists.txt": "# nothing to build\n",
    "server/tensor/tensor.h": '#include "server/base/base.h"\n',
    "server/image/image.h": '#include "server/tensor/tensor.h"\n#include "tern/v1/model.pb.h"\n',
    "server/image/image.cc": '#include <png.h>\n#include "server/image/image.h"\n',
    "server/image/CMakeLists.txt": "tern_library(NAME image SRCS image.cc)  # other.cc\n",
    "server/kernels/a_avx2.cc": "#include <immintrin.h>\n",
    "server/kernels/b.cc": "// b\n",
    "server/kernels/CMakeLists.txt": 'foreach(name a_avx2)\n  tern_isa_source(kernels ${name}.cc AVX2 "-mavx2 -mfma")\nendforeach()\n'
                                     'tern_library(NAME kernels\n  SRCS b.cc)\nset_source_files_properties(b.cc PROPERTIES X 1)\n',
    "server/rpc/rpc.cc": '#include "grpcpp/grpcpp.h"\n#include "tern/v1/classifier.grpc.pb.h"\n#include "server/image/image.h"\n',
    "server/rpc/CMakeLists.txt": "tern_library(NAME rpc SRCS rpc.cc)\n",
    "client/client.cc": '#include "client/client.h"\n#include "grpcpp/grpcpp.h"\n',
    "client/client.h": '#include "tern/v1/classifier.grpc.pb.h"\n',
    "client/CMakeLists.txt": "add_library(client client.cc)\n",
    "statistics/statistics.h": '#include "tern/v1/model.pb.h"\n',
    "statistics/statistics.cc": '#include "statistics/statistics.h"\n',
    "statistics/CMakeLists.txt": "tern_library(NAME statistics SRCS statistics.cc)\n",
    "models/CMakeLists.txt": "",
    "proto/tern/v1/model.proto": 'syntax = "proto3";\n',
    "proto/CMakeLists.txt": "tern_proto_library(NAME model_proto PROTOS tern/v1/model.proto)\n",
    "README.md": "Serves images. See http://www.example.org/" "work/of/art, a/" "work/b, \"$tree\"/" "root/x and network/x.\n",
}


class LintTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.root = pathlib.Path(self.folder.name)
        for name, text in TREE.items():
            self.put(name, text)

    def tearDown(self):
        self.folder.cleanup()

    def put(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def add(self, name, text):
        self.put(name, TREE[name] + text)

    def expect(self, check, *words):
        """One problem, which holds all words."""
        problems = check.check(self.root)
        self.assertEqual(len(problems), 1, problems)
        for word in words:
            self.assertIn(word, problems[0])

    def test_a_clean_tree_passes(self):
        for check in (check_layers, check_orphans, check_words):
            self.assertEqual(check.check(self.root), [])

    # Layers.

    def test_an_include_upwards_is_found(self):
        self.add("server/image/image.cc", '#include "server/rpc/rpc.h"\n')
        self.put("server/rpc/rpc.h", "")
        self.expect(check_layers, "server/image/image.cc:3", "server/image may not include server/rpc/rpc.h")

    def test_an_undeclared_include_is_found(self):
        self.add("server/kernels/b.cc", '#include "server/image/image.h"\n')
        self.expect(check_layers, "server/kernels may not include")

    def test_foreign_messages_are_found(self):
        self.add("server/image/image.cc", '#include "tern/v1/classifier.pb.h"\n')
        self.expect(check_layers, "server/image may not include tern/v1/classifier.pb.h")

    def test_a_library_outside_its_folder_is_found(self):
        for include, owner in (("<turbojpeg.h>", "server/image"), ('"opencv2/imgproc.hpp"', "server/image"),
                               ("<immintrin.h>", "server/kernels"), ('"grpcpp/grpcpp.h"', "server/rpc"),
                               ('"prometheus/counter.h"', "server/metrics"), ('"dnnl.hpp"', "server/engine"),
                               ('"oneapi/dnnl/dnnl.hpp"', "server/engine"), ("<onnx/onnx_pb.h>", "server/onnx"),
                               ("<libexif/exif-data.h>", "server/image"), ("<webp/decode.h>", "server/image")):
            self.put("server/tensor/tensor.h", f"#include {include}\n")
            self.expect(check_layers, "server/tensor/tensor.h:1", owner)

    def test_the_client_and_the_server_stay_apart(self):
        self.add("client/client.cc", '#include "server/image/image.h"\n')
        self.expect(check_layers, "client/client.cc:3", "no code with the server")
        self.put("client/client.cc", TREE["client/client.cc"])
        self.add("server/rpc/rpc.cc", '#include "client/client.h"\n')
        self.expect(check_layers, "server/rpc/rpc.cc:4", "no code with the client")

    def test_what_server_and_client_share_stands_below_both(self):
        self.add("client/client.cc", '#include "statistics/statistics.h"\n')
        self.add("server/rpc/rpc.cc", '#include "statistics/statistics.h"\n')
        self.assertEqual(check_layers.check(self.root), [])
        self.add("statistics/statistics.h", '#include "server/base/base.h"\n')
        self.expect(check_layers, "statistics/statistics.h:2", "only itself and model_proto")
        self.put("statistics/statistics.h", '#include "tern/v1/classifier.pb.h"\n')
        self.expect(check_layers, "statistics/statistics.h:1", "only itself and model_proto")

    def test_a_test_helper_in_the_server_is_found(self):
        self.put("tests/image/helper.h", "")
        self.add("server/image/image.cc", '#include "tests/image/helper.h"\n')
        self.expect(check_layers, "includes a test's")

    def test_models_are_for_the_application(self):
        self.put("models/embedded.h", "")
        self.add("server/rpc/rpc.cc", '#include "models/embedded.h"\n')
        self.expect(check_layers, "only server/app includes")

    def test_headers_in_a_circle_are_found(self):
        self.put("server/image/other.h", '#include "server/image/image.h"\n')
        self.add("server/image/image.h", '#include "server/image/other.h"\n')
        self.expect(check_layers, "include each other", "server/image/other.h")

    def test_a_cycle_of_layers_is_found(self):
        self.put("tests/lint/layers.txt", TREE["tests/lint/layers.txt"].replace("tensor:", "tensor: rpc"))
        self.expect(check_layers, "cycle", "tensor", "rpc", "image")

    def test_an_unlisted_folder_is_found(self):
        self.put("server/extra/extra.h", "")
        self.expect(check_layers, "server/extra: has no line")

    def test_a_line_without_its_folder_is_found(self):
        self.add("tests/lint/layers.txt", "gone: tensor\n")
        self.expect(check_layers, "no folder server/gone")

    def test_a_missing_header_is_found(self):
        self.add("server/image/image.cc", '#include "server/image/gone.h"\n')
        self.expect(check_layers, "server/image/gone.h does not exist")

    # Orphans.

    def test_a_source_that_nobody_builds_is_found(self):
        self.put("server/image/forgotten.cc", "")
        self.expect(check_orphans, "server/image/forgotten.cc: no CMakeLists.txt lists it")

    def test_a_source_in_a_comment_is_not_built(self):
        self.put("server/image/other.cc", "")
        self.expect(check_orphans, "server/image/other.cc: no CMakeLists.txt")

    def test_a_source_that_is_only_mentioned_is_not_built(self):
        self.put("server/kernels/CMakeLists.txt", TREE["server/kernels/CMakeLists.txt"].replace("SRCS b.cc", "SRCS"))
        self.expect(check_orphans, "server/kernels/b.cc: no CMakeLists.txt")

    def test_a_header_that_nobody_includes_is_found(self):
        self.put("client/forgotten.h", '#include "client/forgotten.h"\n')
        self.expect(check_orphans, "client/forgotten.h: no file includes it")

    def test_a_header_in_front_of_a_librarys_own_is_no_orphan(self):
        self.put("tests/front/png.h", "#include_next <png.h>\n")
        self.assertEqual(check_orphans.check(self.root), [])
        self.put("tests/front/other.h", "#include_next <png.h>\n")
        self.expect(check_orphans, "tests/front/other.h: no file includes it")

    def test_a_message_that_nobody_builds_is_found(self):
        self.put("proto/tern/v1/forgotten.proto", "")
        self.expect(check_orphans, "forgotten.proto: no CMakeLists.txt")

    def test_a_source_built_twice_is_found(self):
        self.add("server/image/CMakeLists.txt", "add_executable(tool image.cc)\n")
        self.expect(check_orphans, "server/image/image.cc: listed 2 times")

    def test_a_listed_source_that_is_missing_is_found(self):
        self.add("server/image/CMakeLists.txt", "add_executable(tool gone.cc)\n")
        self.expect(check_orphans, "lists gone.cc, which does not exist")

    # Words.

    def test_unfinished_work_is_found(self):
        for word in ("TO" + "DO", "FIX" + "ME", "X" + "XX"):
            self.add("server/image/image.cc", f"// {word}: later\n")
            self.expect(check_words, "server/image/image.cc:3", "unfinished", word)

    def test_paths_of_one_machine_are_found(self):
        for path in ("/wo" + "rk/main", "/ro" + "ot/x", "/ho" + "me/someone/x", "'/wo" + "rk'"):
            self.put("README.md", f"Look in {path}\n")
            self.expect(check_words, "README.md:1", "a path of one machine")

    def test_package_hosts_are_found(self):
        for host in ("http://deb.deb" + "ian.org/debian", "https://py" + "pi.org/simple"):
            self.put("README.md", f"{host}\n")
            self.expect(check_words, "a package host")

    def test_a_large_file_is_found(self):
        (self.root / "model.bin").write_bytes(b"\xff" * 3_000_001)
        self.expect(check_words, "model.bin: 3000001 bytes")

    def test_temporary_names_are_no_marker(self):
        self.add("server/image/image.cc", 'mkdtemp("/tmp/a_' + 6 * "X" + '");\n')
        self.assertEqual(check_words.check(self.root), [])

    def test_what_git_ignores_is_not_checked(self):
        self.put("out/log.txt", "TO" + "DO\n")
        self.expect(check_words, "out/log.txt")
        subprocess.run(["git", "init", "-q", str(self.root)], check=True)
        self.put(".gitignore", "out/\n")
        self.assertEqual(check_words.check(self.root), [])
        self.put("new.txt", "TO" + "DO\n")
        self.expect(check_words, "new.txt:1")


if __name__ == "__main__":
    unittest.main()
