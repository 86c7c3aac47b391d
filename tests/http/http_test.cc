// The transport: limits, timeouts and connections, with a client of bytes.
#include <atomic>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "server/http/server.h"
#include "tests/http/client.h"

namespace tern::http {
namespace {

using tern::testing::Answer;
using tern::testing::Connection;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

class HttpTest : public ::testing::Test {
 protected:
  // A server that answers with method, path and body of the request, and takes no body for /closed.
  void Start(ServerOptions options = {}) {
    Start(std::move(options), [](Request request, Respond respond) {
      Response response;
      if (request.waits) {
        response.status = request.path == "/closed" ? 405 : 100;
        return respond(std::move(response));
      }
      response.body = absl::StrCat(request.method, " ", request.path, " ", request.body);
      respond(std::move(response));
    });
  }
  void Start(ServerOptions options, Handler handler) {
    options.host = "127.0.0.1";
    options.port = 0;
    options.refused = [this](int status) {
      std::lock_guard<std::mutex> lock(mutex_);
      refused_.push_back(status);
    };
    auto server = Server::Start(options, std::move(handler));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  std::vector<int> refused() {
    std::lock_guard<std::mutex> lock(mutex_);
    return refused_;
  }
  // One request on a connection of its own.
  Answer Ask(const std::string& request) {
    Connection connection(server_->port());
    connection.Send(request);
    return Answer(connection.ReadOne());
  }

  std::mutex mutex_;
  std::vector<int> refused_;
  std::unique_ptr<Server> server_;
};

TEST_F(HttpTest, PassesMethodPathAndBody) {
  Start();
  const Answer answer = Ask("POST /a/b?c=d HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello");
  EXPECT_EQ(answer.status, 200);
  EXPECT_EQ(answer.body, "POST /a/b hello");
  const Answer chunked =
      Ask("POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "
          "chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
  EXPECT_EQ(chunked.body, "POST /a abcde");
}

TEST_F(HttpTest, AConnectionTakesManyRequestsAlsoAtOnce) {
  Start();
  Connection connection(server_->port());
  connection.Send("GET /1 HTTP/1.1\r\nHost: x\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(Answer(connection.ReadOne()).body, "GET /1 ");
  EXPECT_EQ(Answer(connection.ReadOne()).body, "GET /2 ");
  connection.Send("GET /3 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  EXPECT_EQ(Answer(connection.ReadAll()).body, "GET /3 ");
}

TEST_F(HttpTest, HeadHasTheLengthWithoutTheBody) {
  Start();
  Connection connection(server_->port());
  connection.Send("HEAD /1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  const Answer answer(connection.ReadAll());
  EXPECT_EQ(answer.Header("Content-Length"), "7");
  EXPECT_EQ(answer.body, "");
}

TEST_F(HttpTest, ALargeBodyIsAskedForBeforeItIsSent) {
  Start();
  Connection connection(server_->port());
  connection.Send(
      "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(Answer(connection.ReadOne()).status, 100);
  connection.Send("ok");
  EXPECT_EQ(Answer(connection.ReadOne()).body, "POST /a ok");
}

TEST_F(HttpTest, NoBodyIsAskedForThatIsRefusedOrOfAnOldClient) {
  ServerOptions options;
  options.max_body_bytes = 1000;
  Start(options);
  const std::string expect = "Expect: 100-continue\r\n";
  for (const auto& [head, status] : std::vector<std::pair<std::string, int>>{
           {"POST /closed HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n", 405},
           {"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n", 413},
           {"POST /a HTTP/1.1\r\nContent-Length: 2\r\n", 400}}) {
    Connection connection(server_->port());
    connection.Send(head + expect + "\r\n");
    const Answer answer(connection.ReadOne());
    EXPECT_EQ(answer.status, status) << head;
    EXPECT_EQ(answer.Header("Connection"), "close") << head;
    EXPECT_EQ(connection.ReadAll(), "") << head;
  }
  Connection old(server_->port());
  old.Send("POST /a HTTP/1.0\r\nContent-Length: 2\r\n" + expect + "\r\nok");
  EXPECT_THAT(old.ReadAll(), AllOf(StartsWith("HTTP/1.0 200"), EndsWith("POST /a ok")));
}

TEST_F(HttpTest, ABodyOfDoubtfulLengthEndsTheConnection) {
  Start();
  const std::string hidden = "GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n";
  const std::string chunked = "0\r\n\r\n" + hidden;
  for (const auto& [fields, status] : std::vector<std::pair<std::string, int>>{
           {"Transfer-Encoding: foo\r\n", 501},
           {"Transfer-Encoding: xchunked\r\n", 501},
           {"Transfer-Encoding: identity\r\n", 501},
           {"Transfer-Encoding:\r\n", 501},
           {"Transfer-Encoding: gzip, chunked\r\n", 501},
           {"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", 501},
           {"Transfer-Encoding: chunked, foo\r\n", 400},
           {"Transfer-Encoding: Chunked, chunked\r\n", 400},
           {"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400},
           {"Transfer-Encoding: chunked\r\nTransfer-Encoding: foo\r\n", 400},
           {"Transfer-Encoding : chunked\r\n", 400},
           {"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", 400},
           {"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400},
           {"Transfer-Encoding: foo\r\nContent-Length: 5\r\n", 400},
           {"Content-Length: 5\r\nTransfer-Encoding: foo\r\n", 400},
           {"Content-Length: 5\r\nContent-Length: 0\r\n", 400},
           {"Content-Length: 5, 0\r\n", 400},
           {"Content-Length: +5\r\n", 400},
           {"Content-Length: -5\r\n", 400}}) {
    Connection connection(server_->port());
    connection.Send("POST /a HTTP/1.1\r\nHost: x\r\n" + fields + "\r\n" + chunked);
    const Answer answer(connection.ReadOne());
    EXPECT_EQ(answer.status, status) << fields;
    EXPECT_EQ(answer.Header("Connection"), "close") << fields;
    EXPECT_EQ(connection.ReadAll(), "") << fields;
  }
  Connection old(server_->port());
  old.Send("POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked);
  const std::string answers = old.ReadAll();
  EXPECT_THAT(answers, StartsWith("HTTP/1.0 400"));
  EXPECT_THAT(answers, Not(HasSubstr("hidden")));
  EXPECT_EQ(refused().size(), 20u);
  EXPECT_EQ(
      Ask("POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:  CHUNKED \r\n\r\n0\r\n\r\n").body,
      "POST /a ");
}

TEST_F(HttpTest, ARequestNamesOneHost) {
  Start();
  EXPECT_EQ(Ask("GET /a HTTP/1.1\r\n\r\n").status, 400);
  EXPECT_EQ(Ask("GET /a HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n").status, 400);
  EXPECT_EQ(Ask("GET /a HTTP/1.1\r\nHost:\r\n\r\n").status, 200);
  Connection old(server_->port());
  old.Send("GET /a HTTP/1.0\r\n\r\n");
  EXPECT_THAT(old.ReadAll(), StartsWith("HTTP/1.0 200"));
  Connection connection(server_->port());
  connection.Send("HEAD /a HTTP/1.1\r\n\r\n");
  EXPECT_THAT(connection.ReadAll(), AllOf(StartsWith("HTTP/1.1 400"), EndsWith("\r\n\r\n")));
}

TEST_F(HttpTest, ATargetMayHaveSchemeAndHost) {
  Start();
  for (const auto& [target, path] : std::vector<std::pair<std::string, std::string>>{
           {"http://host/v2/health/live", "/v2/health/live"},
           {"HTTPS://host:8502/a?b=c", "/a"},
           {"http://host?b=/c", "/"},
           {"http://host", "/"},
           {"/http://host/a", "/http://host/a"}}) {
    EXPECT_EQ(Ask("GET " + target + " HTTP/1.1\r\nHost: host\r\n\r\n").body, "GET " + path + " ");
  }
}

TEST_F(HttpTest, LimitsAnswerWithTheirStatusAndAreTold) {
  ServerOptions options;
  options.max_body_bytes = 1000;
  options.max_header_bytes = 2000;
  Start(options);
  EXPECT_EQ(Ask("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n").status, 413);
  // Without a length: counted while it comes.
  EXPECT_EQ(Ask("POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" +
                std::string(1001, 'x') + "\r\n0\r\n\r\n")
                .status,
            413);
  EXPECT_EQ(Ask("GET /a HTTP/1.1\r\nHost: x\r\nX: " + std::string(3000, 'x') + "\r\n\r\n").status,
            431);
  const Answer junk = Ask("\x16\x03\x01 this is not HTTP\r\n\r\n");
  EXPECT_EQ(junk.status, 400);
  EXPECT_THAT(junk.body, HasSubstr("{\"error\":\"not HTTP"));
  EXPECT_THAT(refused(), ElementsAre(413, 413, 431, 400));
  EXPECT_EQ(Ask("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nok").status, 200);
}

TEST_F(HttpTest, AllBodiesTogetherAreBounded) {
  ServerOptions options;
  options.max_body_bytes = 1000;
  options.max_total_body_bytes = 1500;
  Start(options);
  const std::string request = "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n";
  {
    Connection first(server_->port());
    first.Send(request + std::string(900, 'x'));  // and no more for now
    // The first is known to be counted once another is refused.
    while (Ask(request + std::string(1000, 'x')).status != 503) {
    }
    first.Send(std::string(100, 'x'));
    EXPECT_EQ(Answer(first.ReadOne()).status, 200);
  }
  EXPECT_EQ(Ask(request + std::string(1000, 'x')).status, 200);
}

TEST_F(HttpTest, SlowClientsAreClosedAndHoldNobodyUp) {
  ServerOptions options;
  options.threads = 1;
  options.timeout = absl::Milliseconds(300);
  Start(options);
  std::vector<std::unique_ptr<Connection>> slow;
  for (int i = 0; i < 20; ++i) {
    slow.push_back(std::make_unique<Connection>(server_->port()));
    slow.back()->Send(i % 2 == 0 ? "GET /slow HTTP/1.1\r\nHost: x\r\nHo" : "");
  }
  EXPECT_EQ(Ask("GET /fast HTTP/1.1\r\nHost: x\r\n\r\n").status, 200);
  for (auto& connection : slow) EXPECT_EQ(connection->ReadAll(), "");  // ends when it is closed
}

TEST_F(HttpTest, OverTheLimitTheConnectionThatIsIdleLongestIsClosed) {
  ServerOptions options;
  options.max_connections = 3;
  options.threads = 1;  // the order of events is theirs
  Start(options);
  const std::string request = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n";
  std::vector<std::unique_ptr<Connection>> idle;
  for (int i = 0; i < 3; ++i) {
    idle.push_back(std::make_unique<Connection>(server_->port()));
    idle.back()->Send(request);
    EXPECT_EQ(Answer(idle.back()->ReadOne()).status, 200);
  }
  idle[0]->Send(request);  // the second is idle longest now
  EXPECT_EQ(Answer(idle[0]->ReadOne()).status, 200);
  EXPECT_EQ(Ask(request).status, 200);
  EXPECT_EQ(idle[1]->ReadAll(), "");
  for (int i : {0, 2}) {
    idle[i]->Send(request);
    EXPECT_EQ(Answer(idle[i]->ReadOne()).status, 200) << i;
  }
  for (int i = 0; i < 50; ++i) EXPECT_EQ(Ask(request).status, 200) << i;
  EXPECT_THAT(refused(), ElementsAre());
}

TEST_F(HttpTest, AHeaderThatDoesNotComeKeepsNobodyOut) {
  ServerOptions options;
  options.max_connections = 2;
  options.threads = 1;  // the order of events is theirs
  Start(options);
  Connection first(server_->port()), second(server_->port());
  for (Connection* slow : {&first, &second}) slow->Send("GET /slow HTTP/1.1\r\nHo");
  // A connection has its place once it is accepted, and can lose it a moment later.
  while (Ask("GET /a HTTP/1.1\r\nHost: x\r\n\r\n").status != 200) {
  }
  EXPECT_EQ(first.ReadAll(), "");
}

TEST_F(HttpTest, WhenAllConnectionsAreBusyANewOneIsClosed) {
  ServerOptions options;
  options.max_connections = 2;
  std::mutex mutex;
  std::vector<Respond> waiting;
  std::promise<void> both;
  Start(options, [&](Request, Respond respond) {
    std::lock_guard<std::mutex> lock(mutex);
    waiting.push_back(std::move(respond));
    if (waiting.size() == 2) both.set_value();
  });
  Connection first(server_->port()), second(server_->port());
  for (Connection* busy : {&first, &second}) busy->Send("GET /a HTTP/1.1\r\nHost: x\r\n\r\n");
  both.get_future().wait();
  Connection third(server_->port());
  EXPECT_EQ(third.ReadAll(), "");
  EXPECT_THAT(refused(), ElementsAre(503));
  for (const Respond& respond : waiting) respond({});
  for (Connection* busy : {&first, &second}) EXPECT_EQ(Answer(busy->ReadOne()).status, 200);
}

TEST_F(HttpTest, AnswersMayComeLaterFromAnotherThread) {
  std::vector<std::thread> threads;
  std::mutex mutex;
  Start({}, [&](Request request, Respond respond) {
    std::lock_guard<std::mutex> lock(mutex);
    threads.emplace_back([path = request.path, respond] {
      Response response;
      response.body = path;
      respond(std::move(response));
    });
  });
  std::vector<std::unique_ptr<Connection>> connections;
  for (int i = 0; i < 30; ++i) {
    connections.push_back(std::make_unique<Connection>(server_->port()));
    connections.back()->Send(absl::StrCat("GET /", i, " HTTP/1.1\r\nHost: x\r\n\r\n"));
  }
  for (int i = 0; i < 30; ++i)
    EXPECT_EQ(Answer(connections[i]->ReadOne()).body, absl::StrCat("/", i));
  for (std::thread& thread : threads) thread.join();
}

TEST_F(HttpTest, WorkThatAnotherThreadPostsRunsOnTheServers) {
  ServerOptions options;
  options.threads = 1;
  std::thread other;
  Start(options, [&](Request request, Respond respond) {
    const std::thread::id servers = std::this_thread::get_id();
    other = std::thread([post = request.post, respond, servers] {
      post([respond, servers] {
        Response response;
        response.body = std::this_thread::get_id() == servers ? "there" : "elsewhere";
        respond(std::move(response));
      });
    });
  });
  Connection connection(server_->port());
  connection.Send("GET /a HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(Answer(connection.ReadOne()).body, "there");
  other.join();
}

TEST_F(HttpTest, ShutdownLetsARequestThatHasArrivedBeAnswered) {
  std::promise<Respond> promise;
  Start({}, [&](Request request, Respond respond) { promise.set_value(std::move(respond)); });
  Connection idle(server_->port());
  Connection connection(server_->port());
  connection.Send("GET /a HTTP/1.1\r\nHost: x\r\n\r\n");
  Respond respond = promise.get_future().get();
  std::thread shutdown([&] { server_->Shutdown(absl::Seconds(60)); });
  EXPECT_EQ(idle.ReadAll(), "");  // closed at once
  Response response;
  response.body = "late";
  respond(std::move(response));
  const Answer answer(connection.ReadAll());
  EXPECT_EQ(answer.body, "late");
  EXPECT_EQ(answer.Header("Connection"), "close");
  shutdown.join();
}

TEST_F(HttpTest, ATakenPortAndABadAddressAreTold) {
  Start();
  ServerOptions options;
  options.host = "127.0.0.1";
  options.port = server_->port();
  const auto taken = Server::Start(options, [](Request, Respond) {});
  EXPECT_EQ(taken.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(taken.status().message()), HasSubstr(absl::StrCat(server_->port())));
  options.host = "nowhere";
  EXPECT_EQ(Server::Start(options, [](Request, Respond) {}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tern::http
