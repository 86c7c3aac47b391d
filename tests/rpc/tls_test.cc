// TLS against gRPC's own client, with certificates that the openssl program makes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "absl/strings/str_split.h"
#include "server/base/log.h"
#include "server/rpc/tls_files.h"
#include "tests/rpc/access_fixture.h"

namespace tern::rpc {
namespace {

using ::grpc::StatusCode;
using ::testing::HasSubstr;

class TlsTest : public testing::AccessFixture {
 protected:
  void SetUp() override {
    AccessFixture::SetUp();
    if (!Run("openssl version")) GTEST_SKIP() << "the program openssl is not installed";
    MakeAuthority("ca");
    MakeAuthority("other-ca");
    Issue("ca", "server");
  }

  std::string Path(const std::string& name) const { return root_ + "/.tls-" + name; }
  static std::string ReadAll(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }
  bool Run(const std::string& command) const {
    return std::system((command + " >>" + Path("log") + " 2>&1").c_str()) == 0;
  }
  static constexpr char kNewKey[] =
      "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj ";
  void MakeAuthority(const std::string& name) {
    ASSERT_TRUE(Run(absl::StrCat("openssl req -x509 -days 2 ", kNewKey, "/CN=", name, " -keyout ",
                                 Path(name + ".key"), " -out ", Path(name + ".crt"))));
  }
  // `name`.crt and `name`.key, for 127.0.0.1.
  void Issue(const std::string& authority, const std::string& name) {
    std::ofstream(Path("san")) << "subjectAltName=IP:127.0.0.1\n";
    ASSERT_TRUE(Run(absl::StrCat("openssl req ", kNewKey, "/O=Tern/CN=", name, " -keyout ",
                                 Path(name + ".key"), " -out ", Path("csr"))) &&
                Run(absl::StrCat("openssl x509 -req -days 2 -in ", Path("csr"), " -CA ",
                                 Path(authority + ".crt"), " -CAkey ", Path(authority + ".key"),
                                 " -CAcreateserial -extfile ", Path("san"), " -out ",
                                 Path(name + ".crt"))));
  }
  void ServeTls() {
    options_.tls_certificate = Path("server.crt");
    options_.tls_key = Path("server.key");
  }
  // Trusts `authority`; brings the certificate of `name`, if that is not empty.
  Credentials Tls(const std::string& authority, const std::string& name = "") const {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = ReadAll(Path(authority + ".crt"));
    if (!name.empty()) {
      options.pem_cert_chain = ReadAll(Path(name + ".crt"));
      options.pem_private_key = ReadAll(Path(name + ".key"));
    }
    return grpc::SslCredentials(options);
  }
};

TEST_F(TlsTest, BothPortsSpeakTlsAndNothingElse) {
  ServeTls();
  Start();
  EXPECT_TRUE(Classify(Connect(server_->port(), Tls("ca"))).ok());
  EXPECT_TRUE(Get(Connect(server_->admin_port(), Tls("ca"))).ok());
  for (const int port : {server_->port(), server_->admin_port()}) {
    EXPECT_EQ(Classify(Connect(port)).error_code(), StatusCode::UNAVAILABLE);
    EXPECT_EQ(Classify(Connect(port, Tls("other-ca"))).error_code(), StatusCode::UNAVAILABLE);
  }
}

TEST_F(TlsTest, TokensWorkInsideTls) {
  ServeTls();
  options_.admin_token_file = Path("tokens");
  std::ofstream(Path("tokens")) << "ops:0123456789abcdef\n";
  Start();
  const auto channel = Connect(server_->admin_port(), Tls("ca"));
  EXPECT_EQ(Get(channel).error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(Get(channel, {"Bearer 0123456789abcdef"}).ok());
}

TEST_F(TlsTest, EachPortAsksForCertificatesOfItsOwnAuthority) {
  ServeTls();
  MakeAuthority("admin-ca");
  Issue("other-ca", "app");
  Issue("admin-ca", "ops");
  options_.tls_client_ca = Path("other-ca.crt");
  options_.admin_tls_client_ca = Path("admin-ca.crt");
  ::testing::internal::CaptureStderr();
  ASSERT_TRUE(InitLog("error").ok());
  Start();
  EXPECT_TRUE(Classify(Connect(server_->port(), Tls("ca", "app"))).ok());
  EXPECT_FALSE(Classify(Connect(server_->port(), Tls("ca", "ops"))).ok());
  EXPECT_FALSE(Classify(Connect(server_->port(), Tls("ca"))).ok());
  EXPECT_TRUE(Get(Connect(server_->admin_port(), Tls("ca", "ops"))).ok());
  EXPECT_FALSE(Get(Connect(server_->admin_port(), Tls("ca", "app"))).ok());
  EXPECT_FALSE(Get(Connect(server_->admin_port(), Tls("ca"))).ok());
  server_->Shutdown(absl::Seconds(5));
  const std::string log = ::testing::internal::GetCapturedStderr();
  ASSERT_TRUE(InitLog("info").ok());
  EXPECT_THAT(log, HasSubstr(R"(caller="certificate:CN=ops,O=Tern")"));
}

TEST_F(TlsTest, NewConnectionsUseARotatedCertificateAndOldOnesGoOn) {
  ServeTls();
  Start();
  const auto before = Connect(server_->port(), Tls("ca"));
  ASSERT_TRUE(Classify(before).ok());
  Issue("other-ca", "server");
  bool rotated = false;
  for (int i = 0; i < 300 && !rotated; ++i) {
    rotated = Classify(Connect(server_->port(), Tls("other-ca"))).ok();
    if (!rotated) absl::SleepFor(absl::Milliseconds(100));
  }
  EXPECT_TRUE(rotated);
  EXPECT_FALSE(Classify(Connect(server_->port(), Tls("ca"))).ok());
  EXPECT_TRUE(Classify(before).ok());

  // The key of another certificate: the pair of before stays in use.
  Issue("ca", "stranger");
  ASSERT_TRUE(Run("cp " + Path("stranger.key") + " " + Path("server.key")));
  bool noticed = false;
  for (int i = 0; i < 300 && !noticed; ++i) {
    EXPECT_TRUE(Classify(Connect(server_->port(), Tls("other-ca"))).ok());
    noticed = Measured("tern_fallbacks_total{reason=\"stale_certificate\"}", "1");
    if (!noticed) absl::SleepFor(absl::Milliseconds(100));
  }
  EXPECT_TRUE(noticed);
  EXPECT_TRUE(Classify(Connect(server_->port(), Tls("other-ca"))).ok());
}

TEST_F(TlsTest, TheHealthPortIsPlainAndAnswersNothingElse) {
  ServeTls();
  options_.health_port = 0;
  Start();
  ASSERT_NE(server_->health_port(), 0);
  const auto channel = Connect(server_->health_port());
  EXPECT_TRUE(Raw(channel, "/grpc.health.v1.Health/Check").ok());
  EXPECT_EQ(Classify(channel).error_code(), StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(Get(channel).error_code(), StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(
      Raw(channel, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo").error_code(),
      StatusCode::UNIMPLEMENTED);
}

TEST_F(TlsTest, TheExpiryThatIsMeasuredIsOpenssls) {
  ServeTls();
  Start();
  ASSERT_TRUE(Run("openssl x509 -enddate -noout -dateopt iso_8601 -in " + Path("server.crt") +
                  " -out " + Path("end")) ||
              Run("openssl x509 -enddate -noout -dateopt iso_8601 -in " + Path("server.crt") +
                  " >" + Path("end")));
  absl::Time expected;
  std::string error;
  const std::string line(absl::StripSuffix(ReadAll(Path("end")), "\n"));
  ASSERT_TRUE(absl::ParseTime("notAfter=%Y-%m-%d %H:%M:%SZ", line, &expected, &error))
      << line << ": " << error;
  const std::string text = metrics_.Render();
  const std::string name = "\ntern_tls_certificate_expiry_timestamp_seconds{port=\"admin\"} ";
  const size_t at = text.find(name);
  ASSERT_NE(at, std::string::npos);
  EXPECT_EQ(std::stod(text.substr(at + name.size())), absl::ToUnixSeconds(expected));
}

TEST_F(TlsTest, FilesThatDoNotFitStopTheStart) {
  Issue("ca", "stranger");
  std::ofstream(Path("junk")) << "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
  ASSERT_TRUE(Run("openssl ec -aes128 -passout pass:secret -in " + Path("server.key") + " -out " +
                  Path("locked.key")));
  const auto refused = [&](const std::string& certificate, const std::string& key,
                           const std::string& client_ca, const std::string& message) {
    const absl::Status status =
        TlsFiles::Open({Path(certificate), Path(key), client_ca.empty() ? "" : Path(client_ca)})
            .status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(status.ToString(), HasSubstr(message));
  };
  refused("junk", "server.key", "", "no PEM certificate");
  refused("server.key", "server.key", "", "no PEM certificate");
  refused("server.crt", "server.crt", "", "no PEM private key");
  refused("server.crt", "locked.key", "", "no PEM private key without a passphrase");
  refused("server.crt", "stranger.key", "", "is not the key of");
  refused("server.crt", "server.key", "junk", "no PEM certificate");
  std::ofstream(Path("chain")) << ReadAll(Path("server.crt")) << ReadAll(Path("junk"));
  refused("chain", "server.key", "", "certificate 2 cannot be read");
  refused("server.crt", "server.key", "chain", "certificate 2 cannot be read");
  std::ofstream(Path("chain")) << ReadAll(Path("server.crt")) << ReadAll(Path("ca.crt"));
  EXPECT_TRUE(TlsFiles::Open({Path("chain"), Path("server.key"), ""}).ok());
  EXPECT_TRUE(absl::IsNotFound(TlsFiles::Open({Path("absent"), Path("server.key"), ""}).status()));
  EXPECT_TRUE(TlsFiles::Open({Path("server.crt"), Path("server.key"), Path("ca.crt")}).ok());

  options_.tls_certificate = Path("server.crt");
  EXPECT_TRUE(absl::IsInvalidArgument(TryStart()));  // no key
  options_.tls_certificate = "";
  options_.tls_client_ca = Path("ca.crt");
  EXPECT_TRUE(absl::IsInvalidArgument(TryStart()));  // no certificate
}

}  // namespace
}  // namespace tern::rpc
